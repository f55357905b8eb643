"""Collect Python source of installed packages under permissive licences: `python -m benchmarks.nano.corpus OUT`.

Writes OUT/train.txt and OUT/held_out.txt (documents separated by a NUL character; which of them a file belongs to is
told by its content alone, so that another day's corpus holds out the same files) and OUT/sources.json: each package
with its version, licence and share, for the model card.
"""

import argparse
import hashlib
import json
import random
import re
from importlib.metadata import Distribution, distributions
from pathlib import Path

PERMISSIVE = re.compile(r"\b(mit|bsd|apache|isc|psf|python software foundation|0bsd)\b", re.I)
OTHER = re.compile(r"gpl|mpl|mozilla|proprietary|eula|nvidia", re.I)
SEPARATOR = "\0"
LARGEST = 200_000  # bytes of a file: beyond are mostly tables
HELD_OUT = 50  # one file in so many, roughly


def licence(package: Distribution) -> str | None:
    """The package's licence if it is permissive, else None."""
    meta = package.metadata
    classified = [c.rpartition("::")[2].strip() for c in meta.get_all("Classifier") or [] if c.startswith("License")]
    stated = [meta.get("License-Expression"), *classified, (meta.get("License") or "").splitlines()[:1]]
    text = ", ".join(dict.fromkeys(s if isinstance(s, str) else " ".join(s) for s in stated if s))
    return text if PERMISSIVE.search(text) and not OTHER.search(text) else None


def sources(package: Distribution):
    """Texts of the package's Python files, ASCII only."""
    for file in package.files or []:
        path = Path(str(package.locate_file(file)))
        if path.suffix == ".py" and path.is_file() and 500 < path.stat().st_size < LARGEST:
            data = path.read_bytes()
            if data.isascii():
                yield data.decode().replace("\r\n", "\n").replace(SEPARATOR, "")


def collect(limit: int, seed: int = 0):
    """(documents for training, documents held out, packages), up to `limit` bytes."""
    seen, documents, packages = set(), [], []
    for package in sorted(distributions(), key=lambda d: d.metadata["Name"].lower()):
        terms = licence(package)
        if terms is None:
            continue
        packages.append({"name": package.metadata["Name"], "version": package.version, "licence": terms, "bytes": 0})
        for text in sources(package):
            digest = hashlib.sha1(text.encode()).digest()
            if digest not in seen:
                seen.add(digest)
                documents.append((text, digest, packages[-1]))
    random.Random(seed).shuffle(documents)
    train, held_out, total = [], [], 0
    for text, digest, package in documents:
        total += len(text)
        if total > limit:
            break
        (train if int.from_bytes(digest[:4], "big") % HELD_OUT else held_out).append(text)
        package["bytes"] += len(text)
    return train, held_out, packages


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--megabytes", type=float, default=100, help="at most so much text")
    args = parser.parse_args()
    train, held_out, packages = collect(int(args.megabytes * 1e6))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "train.txt").write_text(SEPARATOR.join(train))
    (args.out / "held_out.txt").write_text(SEPARATOR.join(held_out))
    (args.out / "sources.json").write_text(json.dumps([p for p in packages if p["bytes"]], indent=1) + "\n")
    print(f"{args.out}: {len(train)} files to train on, {len(held_out)} held out, of {len(packages)} packages")


if __name__ == "__main__":
    main()

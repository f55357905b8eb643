"""The README's flag table against the settings, its links against the files."""

import re
from pathlib import Path

from rheoserve_sgl.config import DEFAULT_HOST_RATIO, RheoConfig, flag

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_flag_table_is_complete_and_its_defaults_are_true():
    rows = dict(re.findall(r"^\| `(--rheoserve-[a-z-]+)` \| ([^|]+) \|", README, flags=re.M))
    fields = RheoConfig.__dataclass_fields__
    assert set(rows) == {flag(name) for name in fields}
    defaults = {flag(name): field.default for name, field in fields.items()}
    defaults["--rheoserve-token-budget"] = RheoConfig().budget
    defaults["--rheoserve-host-ratio"] = DEFAULT_HOST_RATIO
    rows.pop("--rheoserve-dense-layers")  # the gate's own, in words
    for name, text in rows.items():
        if defaults[name] is not None:
            value = defaults[name]
            assert text.strip("` ") == (f"{value:g}" if isinstance(value, float) else str(value)), name


def test_links_and_make_targets_exist():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


def test_environment_variables_are_documented():
    from rheoserve_sgl import environ

    read = set(re.findall(r'os\.environ\.\w+\("(\w+)"', Path(environ.__file__).read_text()))
    assert len(read) == 7
    for name in read:
        assert name in environ.__doc__
    sources = [path for path in (ROOT / "rheoserve_sgl").rglob("*.py") if path.name != "environ.py"]
    assert sources and not [path.name for path in sources if re.search(r"os\.(environ|getenv)", path.read_text())]

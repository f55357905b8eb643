"""One thing the doctor looked at."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

STATES = ("ok", "note", "bad")


@dataclass(frozen=True)
class Finding:
    """state: "ok"; "note", which costs speed or deserves a look; "bad", with which RheoServe does not serve."""

    name: str
    found: str
    state: str = "ok"
    advice: str = ""

    def as_dict(self) -> dict:
        return asdict(self)


def find(name: str, look: Callable[[], Finding]) -> Finding:
    """What `look` finds; an error in it is a finding too."""
    try:
        return look()
    except Exception as error:  # whatever is broken here, the other checks still tell something
        return Finding(name, f"{type(error).__name__}: {error}", "bad")


def as_table(findings: list[Finding]) -> str:
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:4s}  {finding.name:{width}s}  {finding.found}")
        if finding.advice:
            lines.append(f"{'':4s}  {'':{width}s}  -> {finding.advice}")
    return "\n".join(lines)

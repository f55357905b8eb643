"""Versions against the tested ones, and the hooks against the SGLang that is installed."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, entry_points, version

from rheoserve_sgl import SGLANG_VERSION
from rheoserve_sgl.doctor.finding import Finding, find
from rheoserve_sgl.hooks import HOOKS, misfit

PYTHONS = ((3, 11), (3, 12))
BESIDE = {  # what the tests run with
    "torch": "2.11.0",
    "flashinfer-python": "0.6.15.post1",
    "sglang-kernel": "0.4.5",
    "triton": "3.6.0",
    "transformers": "5.12.1",
}


def look_at_software() -> list[Finding]:
    checks = {"Python": python, "SGLang": sglang, "beside it": others, "plugin": plugin, "hooks": hooks}
    return [find(name, look) for name, look in checks.items()]


def python() -> Finding:
    tested = sys.version_info[:2] in PYTHONS
    advice = "" if tested else "tested with " + " and ".join(".".join(map(str, v)) for v in PYTHONS)
    return Finding("Python", platform.python_version(), "ok" if tested else "note", advice)


def sglang() -> Finding:
    found = version("sglang")
    if found != SGLANG_VERSION:
        return Finding("SGLang", found, "bad", f"pip install sglang=={SGLANG_VERSION}")
    return Finding("SGLang", found)


def others() -> Finding:
    versions, differing = {}, []
    for name, tested in BESIDE.items():
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "none"
        if versions[name].split("+")[0] != tested:  # "+cu130" and the like name a build, not a version
            differing.append(f"{name} {tested}")
    found = ", ".join(f"{name} {number}" for name, number in versions.items())
    if differing:
        return Finding("beside it", found, "note", "tested with " + ", ".join(differing))
    return Finding("beside it", found)


def plugin() -> Finding:
    """The entry point by which SGLang finds RheoServe."""
    found = [point.value for point in entry_points(group="sglang.srt.plugins") if point.name == "rheoserve"]
    if not found:
        return Finding("plugin", "not registered with Python's packages", "bad", "install it into this environment")
    return Finding("plugin", f"{found[0]}, rheoserve-sgl {version('rheoserve-sgl')}")


def hooks() -> Finding:
    wrong = [why for hook in HOOKS if (why := misfit(hook))]
    if wrong:
        return Finding("hooks", f"{len(wrong)} of {len(HOOKS)} do not fit: {'; '.join(wrong)}", "bad")
    return Finding("hooks", f"all {len(HOOKS)} fit the installed SGLang")

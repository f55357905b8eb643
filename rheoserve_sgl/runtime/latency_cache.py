"""What a latency model knows, kept from one start of a server to the next: a small file for each machine and model.

A file that cannot be read or written costs a measurement at the start, and never ends a server.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
from pathlib import Path

from rheoserve_sgl import environ

logger = logging.getLogger(__name__)
NUMBERS = ("device", "host")  # bytes a second


class LatencyCache:
    """The file of one machine, model and settings.

    Args:
        facts: what the numbers are of, by name; with others there is another file
        folder: None: nothing is kept
    """

    def __init__(self, facts: dict, folder: Path | None):
        self._facts = {name: str(value) for name, value in facts.items()}
        name = hashlib.sha256(json.dumps(self._facts, sort_keys=True).encode()).hexdigest()[:16]
        self.path = None if folder is None else folder / f"latency-{name}.json"

    @classmethod
    def of(cls, **facts) -> "LatencyCache":
        """In the folder that the environment names."""
        return cls(facts, environ.cache_folder())

    def read(self, factors: int) -> tuple[float, float, list[float] | None] | None:
        """(device rate, host rate, as many factors or None if none were learnt), or None where nothing is kept."""
        if self.path is None:
            return None
        try:
            kept = json.loads(self.path.read_text())
            device, host = (float(kept[name]) for name in NUMBERS)
            found = None if kept["factors"] is None else [float(factor) for factor in kept["factors"]]
            if not all(0 < rate < math.inf for rate in (device, host)):
                raise ValueError(f"rates of {device} and {host} bytes a second")
            if found is not None and (len(found) != factors or not all(0 <= factor < math.inf for factor in found)):
                raise ValueError(f"factors {found}")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            logger.warning("RheoServe: %s is measured anew: %s: %s", self.path, type(error).__name__, error)
            return None
        return device, host, found

    def write(self, device: float, host: float, factors: list[float] | None):
        """Replace what is kept, in one step: another server may read it meanwhile."""
        if self.path is None:
            return
        document = {"of": self._facts, "device": device, "host": host, "factors": factors}
        fresh = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_text(json.dumps(document, indent=1))
            os.replace(fresh, self.path)
        except OSError as error:
            logger.warning("RheoServe: %s cannot be written: %s", self.path, error)
            self.path = None
            with contextlib.suppress(OSError):  # it may not be there
                fresh.unlink()

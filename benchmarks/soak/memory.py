"""Whether a server's memory grows while the same traffic goes on."""

import threading

import psutil
import torch

EVERY = 2.0  # seconds between looks
MB = 10**6


class MemoryWatch:
    """Looks at the resident memory of a process and its children, and at what is used of the GPU, until it is closed.

    bytes: at each look; "device", where there is a GPU, is of all its processes
    error: what ended the looking, if anything did
    """

    def __init__(self, pid: int):
        self._process, self._stop = psutil.Process(pid), threading.Event()
        self.bytes: dict[str, list[int]] = {"host": []}
        self.error: Exception | None = None
        if torch.cuda.is_available():
            torch.cuda.mem_get_info()  # takes some of the GPU's memory itself: now, not at the first look
            self.bytes["device"] = []
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _look(self):
        try:
            while not self._stop.wait(EVERY):
                self.bytes["host"].append(self._resident())
                if "device" in self.bytes:
                    free, total = torch.cuda.mem_get_info()
                    self.bytes["device"].append(total - free)
        except Exception as error:  # told by whoever asks for the figures
            self.error = error

    def _resident(self) -> int:
        total, found = 0, [self._process]
        try:
            found += self._process.children(recursive=True)
        except psutil.NoSuchProcess:
            pass
        for process in found:
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:
                pass
        return total

    def growth(self) -> dict[str, dict]:
        """Of each memory: see `growth`."""
        return {name: growth(looks) for name, looks in self.bytes.items()}


def growth(looks: list[int]) -> dict:
    """MB at the end of each third (median of its last quarter): the first fills caches, the others are compared."""
    third = len(looks) // 3
    if third < 4:
        return {}
    ends = [sorted(looks[third * i - max(third // 4, 1) : third * i]) for i in (1, 2, 3)]
    middle = [end[len(end) // 2] / MB for end in ends]
    return {
        "thirds_mb": [round(value) for value in middle],
        "last_third_grew": round(middle[2] / middle[1] - 1, 4),
    }

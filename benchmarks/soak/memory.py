"""Whether a server's memory grows while the same traffic goes on."""

import threading

import psutil
import pynvml
import torch

EVERY = 2.0  # seconds between looks
MB = 10**6


class MemoryWatch:
    """Looks at the memory of a process and its children, resident and on GPUs, until it is closed.

    bytes: at each look; "device" where there is a GPU: of all its processes, if the driver never tells of ours
    error: what ended the looking, if anything did
    """

    def __init__(self, pid: int):
        self._process, self._stop = psutil.Process(pid), threading.Event()
        self.bytes: dict[str, list[int]] = {"host": []}
        self.error: Exception | None = None
        if torch.cuda.is_available():
            torch.cuda.mem_get_info()  # takes some of the GPU's memory itself: now, not at the first look
            pynvml.nvmlInit()
            self.bytes["device"] = []
        self._tells = False  # whether the driver has told of this process's family
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
                family = self._family()
                self.bytes["host"].append(sum(map(resident, family)))
                if "device" in self.bytes:
                    self._look_at_devices({process.pid for process in family})
        except Exception as error:  # told by whoever asks for the figures
            self.error = error

    def _look_at_devices(self, pids: set[int]):
        own = on_devices(pids)
        if own and not self._tells:
            self._tells = True
            self.bytes["device"].clear()  # was of others, too
        if not self._tells:
            free, total = torch.cuda.mem_get_info()
            own = total - free
        self.bytes["device"].append(own)

    def _family(self) -> list[psutil.Process]:
        try:
            return [self._process, *self._process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return [self._process]

    def growth(self) -> dict[str, dict]:
        """Of each memory: see `growth`."""
        return {name: growth(looks) for name, looks in self.bytes.items()}


def resident(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def on_devices(pids: set[int]) -> int:
    """Bytes of these processes on all GPUs, as far as the driver tells."""
    devices = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    found = [one for device in devices for one in pynvml.nvmlDeviceGetComputeRunningProcesses(device)]
    return sum(one.usedGpuMemory or 0 for one in found if one.pid in pids)


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

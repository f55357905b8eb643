"""Write-through of a prefill beside its attention, which has the new keys and values from where they were made."""

import torch


class WriteBehind:
    """A stream that writes; `join` before anything reads what was written."""

    def __init__(self):
        self._stream = torch.cuda.Stream()

    def write(self, pool, index: int, loc: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
        """As `TwoTierKVPool.write`, of what the current stream has made."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            pool.write(index, loc, k, v)
        for tensor in (loc, k, v):
            tensor.record_stream(self._stream)

    def join(self):
        """Let the current stream wait for all that was written."""
        torch.cuda.current_stream().wait_stream(self._stream)

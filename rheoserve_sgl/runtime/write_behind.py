"""Write-through of a prefill beside its attention, which has the new keys and values from where they were made."""

import torch


class WriteBehind:
    """A stream that writes; `join` before anything reads what was written.

    One layer's tensors are held until the next layer's are written, so that their memory is not used again meanwhile.
    """

    def __init__(self):
        self._stream = torch.cuda.Stream()
        self._held: tuple[torch.Tensor, ...] = ()

    def write(self, pool, index: int, loc: torch.Tensor, writes, k: torch.Tensor, v: torch.Tensor):
        """As `TwoTierKVPool.write_prefill`, of what the current stream has made, in any shape and dtype."""
        k, v = (t.view(len(t), pool.head_num, pool.head_dim).to(pool.dtype) for t in (k, v))
        self.join()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            pool.write_prefill(index, loc, writes, k, v)
        self._held = loc, k, v

    def join(self):
        """Let the current stream wait for all that was written."""
        torch.cuda.current_stream().wait_stream(self._stream)
        self._held = ()

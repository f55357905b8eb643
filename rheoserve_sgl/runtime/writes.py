"""Where a batch's new tokens went, page by page: built once a step and read by every layer."""

from dataclasses import dataclass

import torch

from rheoserve_sgl import PAGE_TOKENS
from rheoserve_sgl.runtime.batch import Batch, pages_of


@dataclass(frozen=True)
class Writes:
    """The pages that new tokens were written to; each page once.

    pages: `[n]` int64 logical pages
    requests: `[n]` int64, SGLang's req_pool_indices
    token: `[n]` int64, index in the batch of the page's first new token
    before, filled: `[n]` int32, tokens of the page before and after
    key_position: `[n]` int64, where a learned gate rotates the page's key
    most_new: the largest of filled - before, known on the host
    fresh: `[m]` int64, of a prefill: those of the pages that had no tokens before
    """

    pages: torch.Tensor
    requests: torch.Tensor
    token: torch.Tensor
    before: torch.Tensor
    filled: torch.Tensor
    key_position: torch.Tensor
    most_new: int
    fresh: torch.Tensor | None = None

    @classmethod
    def of_decode(cls, batch: Batch, rotate_last: bool = False) -> "Writes":
        """One token a request, on its newest page.

        Args:
            rotate_last: rotate keys at their page's last token, as SeerAttention's published code does for
                pages completed while decoding (it rotates those of a prompt at the first, as it was trained)
        """
        first = (batch.n_pages.long() - 1) * PAGE_TOKENS
        return cls(
            pages=batch.newest,
            requests=batch.requests.long(),
            token=torch.arange(len(batch.newest), device=batch.pages.device),
            before=batch.tail_len - 1,
            filled=batch.tail_len,
            key_position=first + (PAGE_TOKENS - 1 if rotate_last else 0),
            most_new=1,
        )

    @classmethod
    def of_extend(cls, batch: Batch, prefixes: list[int], lengths: list[int]) -> "Writes":
        """`lengths[i]` tokens of request i after `prefixes[i]` that it had."""
        # All of it is known on the host, and reading it from a GPU would wait for the batch before.
        had, new = torch.tensor(prefixes), torch.tensor(lengths)
        skipped = had // PAGE_TOKENS
        ends = pages_of(had + new).clamp(max=batch.pages.shape[1])
        row, at = places(torch.where(new > 0, ends - skipped, 0))
        page = at + skipped[row]
        first = page * PAGE_TOKENS
        before = (had[row] - first).clamp(min=0)
        filled = ((had + new)[row] - first).clamp(max=PAGE_TOKENS)
        token = (torch.cumsum(new, 0) - new)[row] + first + before - had[row]
        fresh = torch.nonzero(before == 0)[:, 0]
        numbers = torch.stack((row, page, token, before, filled, first))
        row, page, token, before, filled, first = to_device(numbers, batch.pages.device)
        pages = batch.pages[row, page]
        return cls(
            pages=pages,
            requests=batch.requests.long()[row],
            token=token,
            before=before.to(torch.int32),
            filled=filled.to(torch.int32),
            key_position=first,
            most_new=min(max(lengths, default=0), PAGE_TOKENS),
            fresh=pages[to_device(fresh, pages.device)],
        )


def places(counts: torch.Tensor) -> torch.Tensor:
    """(row, place in it) `[2, sum(counts)]` int64 of rows with so many places each, all on the host."""
    row = torch.repeat_interleave(torch.arange(len(counts)), counts)
    return torch.stack((row, torch.arange(len(row)) - (torch.cumsum(counts, 0) - counts)[row]))


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on the device; nobody waits."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

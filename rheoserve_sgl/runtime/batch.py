"""A batch as RheoServe sees it: pages instead of tokens, one row a request."""

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from rheoserve_sgl import PAGE_TOKENS
from rheoserve_sgl.ops.plan import forced_pages


def pages_of(tokens):
    """Pages of so many tokens, a number or a tensor."""
    return (tokens + PAGE_TOKENS - 1) // PAGE_TOKENS


@dataclass(frozen=True)
class Rows:
    """The pages of some requests, as an exchange sees them: fields as in Batch."""

    pages: torch.Tensor
    n_pages: torch.Tensor
    valid: torch.Tensor
    forced: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """The page table of a batch, built once a step and read by every layer.

    requests: `[batch]` int64, SGLang's req_pool_indices
    pages: `[batch, max_pages]` int64 logical pages, 0 beyond n_pages
    n_pages: `[batch]` int32
    tail_len: `[batch]` int32, tokens of the newest page, 1 to 64
    valid: `[batch, max_pages]` bool, below n_pages
    forced: `[batch, max_pages]` bool, sink, window and newest page
    newest: `[batch]` int64, each request's last page
    """

    requests: torch.Tensor
    pages: torch.Tensor
    n_pages: torch.Tensor
    tail_len: torch.Tensor
    valid: torch.Tensor
    forced: torch.Tensor
    newest: torch.Tensor

    @classmethod
    def build(cls, req_to_token, requests, seq_lens, longest: int, sink_pages: int, window_pages: int) -> "Batch":
        """Read the page table.

        Args:
            req_to_token: `[slots, context]` int32, SGLang's token table
            requests: `[batch]` rows of it
            seq_lens: `[batch]` tokens of each request, the new ones included, at least 1
            longest: the largest of seq_lens, known on the host
        """
        n_pages, width = pages_of(seq_lens), pages_of(longest)
        at = torch.arange(width, device=req_to_token.device)
        valid = at < n_pages[:, None]
        newest = n_pages[:, None] - 1
        forced = forced_pages(at, n_pages[:, None], sink_pages, window_pages) & valid
        first_tokens = req_to_token[requests, : width * PAGE_TOKENS : PAGE_TOKENS].long()
        pages = torch.where(valid, first_tokens // PAGE_TOKENS, 0).contiguous()
        return cls(
            requests=requests,
            pages=pages,
            n_pages=n_pages.to(torch.int32),
            tail_len=(seq_lens - (n_pages - 1) * PAGE_TOKENS).to(torch.int32),
            valid=valid,
            forced=forced,
            newest=pages.gather(1, newest)[:, 0],
        )

    def beside(self, others: list[torch.Tensor], sink_pages: int, window_pages: int) -> Rows:
        """This batch's pages, and below them other requests', `[n]` int64 each."""
        if not others:
            return Rows(self.pages, self.n_pages, self.valid, self.forced)
        rows = [pages[None] for pages in others]
        width = max(one.shape[1] for one in (self.pages, *rows))
        at = torch.arange(width, device=self.pages.device)
        # (Filled on the device: nothing here waits for a GPU.)
        counts = [torch.full_like(self.n_pages[:1], len(pages)) for pages in others]
        n_pages = torch.cat([self.n_pages, *counts])
        valid = at < n_pages[:, None]
        return Rows(
            pages=torch.cat([pad(one, (0, width - one.shape[1])) for one in (self.pages, *rows)]),
            n_pages=n_pages,
            valid=valid,
            forced=forced_pages(at, n_pages[:, None], sink_pages, window_pages) & valid,
        )

"""The page table of a decode step, read from SGLang's token table into memory that stays where it is.

SGLang may rewrite its table for the next step while this one's graph runs, so a graph never reads it.
"""

import triton
import triton.language as tl

from rheoserve_sgl import PAGE_TOKENS

PAGES = 256  # of one request to a program


@triton.jit(do_not_specialize=["rows"])
def _snapshot(
    table, table_stride, slots, lens, rows, pages, n_pages, tail_len, quiet, newest, requests, max_pages,
    PAGES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    part = tl.program_id(1)
    used = row < rows
    slot = tl.load(slots + row, mask=used, other=0).to(tl.int64)
    length = tl.load(lens + row, mask=used, other=0).to(tl.int32)
    count = (length + TOKENS - 1) // TOKENS
    at = part * PAGES + tl.arange(0, PAGES)
    line = table + slot * table_stride
    tokens = tl.load(line + at.to(tl.int64) * TOKENS, mask=at < count, other=0)
    tl.store(pages + row * max_pages + at, tokens // TOKENS, mask=at < max_pages)
    if part == 0:
        tl.store(n_pages + row, count)
        tl.store(tail_len + row, length - (count - 1) * TOKENS, mask=count > 0)
        tl.store(tail_len + row, 0, mask=count == 0)
        tl.store(quiet + row, 0)
        last = tl.load(line + (count - 1).to(tl.int64) * TOKENS, mask=count > 0, other=0)
        tl.store(newest + row, last // TOKENS)
        tl.store(requests + row, slot)


def snapshot(req_to_token, slots, lens, rows: int, tables):
    """Fill `tables` for `rows` requests; the rows beyond are empty.

    Args:
        req_to_token: `[slots, context]` int32
        slots: `[>= rows]` int64, rows of req_to_token
        lens: `[>= rows]` int64, tokens of each request, the new one included
        tables: Tables
    """
    batch, max_pages = tables.pages.shape
    _snapshot[(batch, triton.cdiv(max_pages, PAGES))](
        req_to_token, req_to_token.stride(0), slots, lens, rows,
        tables.pages, tables.n_pages, tables.tail_len, tables.quiet, tables.newest, tables.requests, max_pages,
        PAGES=PAGES, TOKENS=PAGE_TOKENS,
    )  # fmt: skip

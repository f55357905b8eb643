"""What the live page shows, gathered in the scheduler process: requests, and one head's blocks of one of them."""

import logging

import torch

from rheoserve_sgl.cache.pool import TwoTierKVPool
from rheoserve_sgl.observe import question
from rheoserve_sgl.runtime.transaction import logical_pages, requests_by_state

logger = logging.getLogger(__name__)
COLUMNS = 256  # of a map, at most: longer sequences have several blocks to a column
MOST_REQUESTS = 256
WEIGHT_RANGE = 5.0  # what a block's importance comes to that is selected at every step


def answer(field: str | None, scheduler) -> dict | None:
    """What is asked for in this field; None if it is SGLang's own question."""
    asked = question.read(field)
    if asked is None:
        return None
    try:
        return gather(scheduler, *asked)
    except Exception as error:  # whatever it is: a page that looks on must not end a server
        logger.exception("RheoServe: the live page gets no figures")
        return {"error": f"{type(error).__name__}: {error}"}


def gather(scheduler, rid: str, layer: int, head: int) -> dict:
    """All requests, and the chosen one's map."""
    states = requests_by_state(scheduler)
    chosen = next(
        (request for state, request in states if request.rid == rid and request.req_pool_idx is not None), None
    )
    pool: TwoTierKVPool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    return {
        "requests": [describe(state, request) for state, request in states[:MOST_REQUESTS]],
        "layers": pool.layer_num,
        "heads": pool.head_num,
        "map": None if chosen is None else block_map(scheduler, pool, chosen, layer, head),
    }


def describe(state: str, request) -> dict:
    one = getattr(request, "rheoserve", None)  # looking makes no transaction
    return {
        "rid": request.rid,
        "state": state,
        "prompt_tokens": len(request.origin_input_ids),
        "output_tokens": len(request.output_ids),
        "working_set_pages": round(one.need, 1) if one else 0.0,
    }


def block_map(scheduler, pool: TwoTierKVPool, request, layer: int, head: int) -> dict:
    """One head's blocks in the order of the text, in at most COLUMNS columns.

    weight: 0 to 255, the most important block's importance in each column
    resident: 0 to 255, how many of a column's blocks are resident
    """
    layer, head = min(layer, pool.layer_num - 1), min(head, pool.head_num - 1)
    pages = logical_pages(scheduler, request)
    weight = pool.importance[layer, pages, head] / pool.coordinator.weight / WEIGHT_RANGE
    resident = (pool.residency.frame_of[layer, pages, head] >= 0).float()
    wide = max(-(-len(pages) // COLUMNS), 1)
    weight = torch.stack([part.amax() for part in weight.split(wide)]).clamp(0, 1)
    share = torch.stack([part.mean() for part in resident.split(wide)])
    return {
        "rid": request.rid,
        "layer": layer,
        "head": head,
        "pages": len(pages),
        "blocks_a_column": wide,
        "resident_blocks": int(resident.sum()),
        "weight": (weight * 255).round().int().tolist(),
        "resident": (share * 255).round().int().tolist(),
    }

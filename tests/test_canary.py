"""The canary: what was changed behind the pool's back is found and named; what lives its life is not."""

import pytest
import requests
import torch
from pools import DIM, HEADS, LAYERS, make_pool
from serving import random_prompts, rheo_server

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def written(device: str, dtype=torch.float32, tokens: int = 150):
    """A pool with one sequence in pages 5, 2 and 9, the first two resident."""
    pool, _ = make_pool(64 * 12, 64 * 4, device, dtype, canary="raise")
    pages = torch.tensor([5, 2, 9], device=device)
    loc = (pages[:, None] * 64 + torch.arange(64, device=device)).flatten()[:tokens]
    for layer in range(LAYERS):
        k, v = torch.randn(2, tokens, HEADS, DIM, device=device).to(dtype)
        pool.write(layer, loc[:100], k[:100], v[:100])
        for at in range(100, tokens):
            pool.write(layer, loc[at : at + 1], k[at : at + 1], v[at : at + 1])
    wanted = torch.zeros(LAYERS, pool.host.pages, HEADS, dtype=torch.bool, device=device)
    wanted[:, pages[:2]] = True
    pool.exchange(wanted, 100)
    return pool, pages


def findings(pool, pages) -> list[str]:
    return [found for layer in range(LAYERS) if (found := pool.canary.finding(layer, pages))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_what_was_written_is_found_right(device, dtype):
    pool, pages = written(device, dtype)
    assert findings(pool, pages) == []
    pool.write(0, pages[2:] * 64, *torch.randn(2, 1, HEADS, DIM, device=device).to(dtype))  # anew, as a session may
    assert findings(pool, pages) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_every_changed_bit_is_named(device, dtype):
    pool, pages = written(device, dtype)
    words = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        row, layer, head, part, dim = (
            int(torch.randint(most, (1,), generator=generator)) for most in (3, LAYERS, HEADS, 2, DIM)
        )
        token = int(torch.randint(64 if row < 2 else 22, (1,), generator=generator))
        page, bit = int(pages[row]), 1 << int(torch.randint(15, (1,), generator=generator))
        where = f"page {page}, layer {layer}, KV head {head}: token {token} in "
        stored = pool.host.layers[layer].view(words)[page, head, part, token]
        stored[dim] ^= bit
        [found] = findings(pool, pages)
        assert found == f"RheoServe canary: {where}the host store is not what was written"
        stored[dim] ^= bit
        if row < 2:
            frame = int(pool.residency.frame_of[layer, page, head])
            held = pool.frames.layers[layer].view(words)[frame, part, token]
            held[dim] ^= bit
            [found] = findings(pool, pages)
            assert found == f"RheoServe canary: {where}frame {frame} is not the host store's"
            held[dim] ^= bit
    assert findings(pool, pages) == []


def test_pages_that_were_given_back_are_nobodys():
    pool, pages = written("cpu")
    pool.coordinator.batch_changed()  # the radix tree keeps its pages
    pool.coordinator.settle()
    pool.host.layers[1][2, 0, 0, 0, 0] += 1
    assert len(findings(pool, pages)) == 1
    pool.coordinator.page_freed(pages[1:2])
    pool.coordinator.settle()
    assert findings(pool, pages) == []


def test_looks_are_spread_and_end_a_server_only_if_asked(monkeypatch, caplog):
    monkeypatch.setattr("rheoserve_sgl.cache.canary.SECONDS", 0.0)
    pool, _ = written("cpu")
    for _ in range(100):
        pool.canary.look()
    assert pool.canary.looked == 100 * 8 * HEADS
    pool.host.layers[0][9, 1, 1, 3, 3] += 1
    with pytest.raises(RuntimeError, match="page 9, layer 0, KV head 1: token 3 in the host store"):
        for _ in range(100):
            pool.canary.look()
    pool.canary.raises = False
    for _ in range(100):
        pool.canary.look()
    assert "page 9, layer 0" in caplog.text


def test_where_nothing_runs_all_pages_of_all_layers_are_looked_at_in_turn(monkeypatch):
    monkeypatch.setattr("rheoserve_sgl.cache.canary.SECONDS", 0.0)
    pool, pages = written("cpu")
    monkeypatch.setattr("rheoserve_sgl.cache.canary.IDLE_BYTES", 2 * LAYERS * HEADS * pool.block_bytes)
    for layer in range(LAYERS):
        for page in pages.tolist():
            stored = pool.host.layers[layer][page, 1, 0, 5]
            before = stored.clone()
            stored += 1
            with pytest.raises(RuntimeError, match=f"page {page}, layer {layer}, KV head 1: token 5"):
                for _ in range(2):  # two of three pages, and the other one
                    pool.canary.look(idle=True)
            stored.copy_(before)
    assert findings(pool, pages) == []


SAYS = {"host": "in the host store is not what was written", "frame": "is not the host store's"}


@pytest.mark.server
@pytest.mark.parametrize("where", [pytest.param("host", marks=pytest.mark.slow), "frame"])
def test_a_server_with_a_fault_ends_and_says_where(where, checkpoints, tmp_path):
    args = ["--rheoserve-canary", "raise", "--rheoserve-device-tokens", "1024"]
    with rheo_server(checkpoints.path(), args, tmp_path, {"RHEOSERVE_TEST_FAULT": where}) as server:
        try:
            server.generate(random_prompts(70, [3000]), 400)
        except (requests.RequestException, AssertionError):
            pass
        assert server.process.wait(60) != 0
        log = server.log.read_text()
        assert "RheoServe canary: page " in log and SAYS[where] in log

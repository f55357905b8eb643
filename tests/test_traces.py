"""Traces of the selection: what is recorded from a real server, and what policies are said to have had."""

import json

import numpy as np
import pytest

from benchmarks.traces.replay import choose, churn, forced_pages, hit_rate, working_set


def made(steps=40, layers=2, heads=2, pages=32, picked=8, drift=0.0):
    """Selections of the best scores, which stay the same but for `drift`."""
    draw = np.random.default_rng(0)
    scores = draw.standard_normal((steps, layers, heads, pages)).astype(np.float32)
    for step in range(1, steps):
        scores[step] = np.where(draw.random(scores[step].shape) < drift, scores[step], scores[step - 1])
    scores = scores * 3 - 6
    best = np.argsort(-scores, axis=-1)[..., :picked]
    selected = np.zeros(scores.shape, bool)
    np.put_along_axis(selected, best, True, -1)
    return {"selected": selected, "scores": scores.astype(np.float16)}


@pytest.mark.parametrize("joint", [False, True])
def test_resident_blocks_are_the_forced_and_the_best(joint):
    worth = np.random.default_rng(1).random((3, 2, 20))
    forced = np.pad(forced_pages(16, 1, 2), (0, 4))
    resident = choose(worth, forced, 16, 6, joint)
    assert not resident[..., 16:].any() and resident[..., forced].all()
    assert (resident.sum((1, 2)) == 12).all()
    if not joint:
        assert (resident.sum(-1) == 6).all()
    for layer in range(3):
        left = worth[layer][:, :16][~resident[layer][:, :16]].max() if joint else None
        chosen = worth[layer][resident[layer] & ~forced]
        assert not joint or chosen.min() > left


def test_a_selection_that_stays_is_all_resident_and_one_that_changes_is_not():
    still, moving = made(), made(drift=0.2)
    assert churn(still["selected"]).max() == 0.0 < churn(moving["selected"]).mean()
    two, eight = (working_set(moving["selected"], steps) for steps in (2, 8))
    assert working_set(still["selected"], 8) == 1.0 < two < eight
    for policy in ("prompt", "importance", "selected"):
        assert hit_rate(still, policy, 0.5, 8, 1, 1) == 1.0
    often, seldom, never = (hit_rate(moving, "importance", 0.3, interval, 1, 1) for interval in (1, 16, 1000))
    assert 1.0 > often > seldom > never
    assert hit_rate(moving, "prompt", 0.3, 1, 1, 1) == pytest.approx(never)
    assert hit_rate(moving, "importance", 1.0, 1, 1, 1) == 1.0


@pytest.mark.server
@pytest.mark.parametrize("generate", [[], ["--generate"]], ids=["forced", "generated"])
def test_a_server_writes_down_what_it_selects(generate, checkpoints, tmp_path, capsys):
    from benchmarks.traces import record, replay

    (tmp_path / "text").write_text("".join(f"    value = compute({n})\n" for n in range(2000)))
    out = tmp_path / "trace.npz"
    record.main([
        "--model", str(checkpoints.path()), "--text", str(tmp_path / "text"), "--out", str(out), "--context", "1000",
        "--steps", "70", "--budget", "512", *generate, "--flags", "--dtype", "float32",
    ])  # fmt: skip
    trace = dict(np.load(out))
    steps, _, heads, pages = trace["selected"].shape
    assert steps == 64 and pages == (1000 + 64 + 63) // 64
    assert (trace["selected"].sum(-1) == 512 // 64).all()
    assert trace["selected"][..., 0].all()  # the sink
    exists = np.isfinite(trace["scores"]).all((1, 2))
    assert (exists.sum(1) == (1000 + np.arange(1, 65) + 63) // 64).all()
    assert not (trace["selected"] & ~exists[:, None, None]).any()
    replay.main([str(out), "--capacities", "0.5", "1"])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(rate == 1.0 for row in document["rows"] if row["capacity"] == 1 for rate in row["hit_rates"])

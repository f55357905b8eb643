"""What a policy of residency would have had on the device: `python -m benchmarks.traces.replay TRACE.npz`.

TRACE is what `benchmarks.traces.record` wrote. Prints how much of the selection changes from step to step, and the hit
rate: the share of selected blocks that are resident, under each policy, capacity (frames as a share of the blocks) and
interval of exchanges. Sink, window and newest page are resident always, and counted. The last line is JSON.

Policies rank blocks by what was seen up to an exchange, with older steps fading by DECAY: `importance`, the gate's
probabilities (RheoServe's), `selected`, how often a block was selected, and `prompt`, the first step's probabilities,
which is residency without exchange. Each head of a layer gets equal frames, or, `joint`, the layer's best blocks do.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from rheoserve_sgl.coordinator.coordinator import DECAY

SETS = (1, 2, 3, 5, 8, 16)  # steps of a working set
POLICIES = ("prompt", "importance", "selected", "importance joint", "selected joint")


def churn(selected: np.ndarray) -> np.ndarray:
    """Share of each selection that was not in the one before, `[steps - 1, layers, kv_heads]`."""
    return (selected[1:] & ~selected[:-1]).sum(-1) / selected[1:].sum(-1)


def working_set(selected: np.ndarray, steps: int) -> float:
    """Blocks that were selected in so many steps, one after another, as a multiple of one step's."""
    sets = [selected[at - steps : at].any(0).sum() for at in range(steps, len(selected) + 1)]
    return float(np.mean(sets) / selected.sum((1, 2, 3)).mean())


def forced_pages(pages: int, sink: int, window: int) -> np.ndarray:
    at = np.arange(pages)
    return (at < sink) | (at >= pages - 1 - window)


def choose(worth: np.ndarray, forced: np.ndarray, pages: int, frames: int, joint: bool) -> np.ndarray:
    """The resident blocks `[layers, kv_heads, all_pages]` bool: forced, then the best of the first `pages`.

    Args:
        frames: of each layer and head, on average
    """
    layers, heads, all_pages = worth.shape
    ranked = np.where(np.arange(all_pages) < pages, worth, -np.inf)
    ranked = np.where(forced, np.inf, ranked)
    rows = ranked.reshape(layers, -1) if joint else ranked.reshape(layers * heads, -1)
    most = min(frames * heads if joint else frames, pages * (heads if joint else 1))
    best = np.argsort(-rows, axis=1, kind="stable")[:, :most]
    resident = np.zeros(rows.shape, bool)
    np.put_along_axis(resident, best, True, 1)
    return resident.reshape(worth.shape)


def hit_rate(trace: dict, policy: str, capacity: float, interval: int, sink: int, window: int) -> float:
    """Over the steps after the first, which no policy has seen anything of before."""
    selected, scores = trace["selected"], trace["scores"]
    steps, _, _, all_pages = selected.shape
    joint, kind = policy.endswith("joint"), policy.split()[0]
    exists = np.isfinite(scores).any((1, 2))  # [steps, pages]
    worth = np.zeros(selected.shape[1:])
    resident = None
    hits = total = 0
    for step in range(steps):
        pages = int(exists[step].sum())
        forced = forced_pages(pages, sink, window)
        forced = np.pad(forced, (0, all_pages - pages))
        if resident is not None:
            here = resident | forced
            hits += int((selected[step] & here).sum())
            total += int(selected[step].sum())
        seen = selected[step] if kind == "selected" else np.exp(scores[step].astype(np.float32))
        if kind != "prompt" or step == 0:
            worth = worth * DECAY + seen
        if step % interval == 0 and (kind != "prompt" or step == 0):
            frames = max(int(capacity * pages), int(forced.sum()))
            resident = choose(worth, forced, pages, frames, joint)
    return hits / total


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--capacities", type=float, nargs="+", default=[1 / 8, 1 / 4, 1 / 2])
    parser.add_argument("--intervals", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--sink", type=int, default=1, help="pages")
    parser.add_argument("--window", type=int, default=4, help="pages")
    args = parser.parse_args(argv)
    trace = dict(np.load(args.trace))
    changed = churn(trace["selected"])
    heads = changed.mean(0)
    print(f"{len(trace['selected'])} steps; a step changes {changed.mean():.1%} of a selection; of a layer's heads:")
    for layer, row in enumerate(heads):
        print(f"  layer {layer:2d}: " + " ".join(f"{share:6.1%}" for share in row))
    sets = {steps: working_set(trace["selected"], steps) for steps in SETS if steps <= len(trace["selected"])}
    print("n steps select, times what one does: " + ", ".join(f"{n}: {times:.2f}" for n, times in sets.items()))
    rows = []
    print(f"\n{'policy':18s} {'capacity':>8s} " + " ".join(f"every {interval:3d}" for interval in args.intervals))
    for capacity in args.capacities:
        for policy in POLICIES:
            rates = [hit_rate(trace, policy, capacity, i, args.sink, args.window) for i in args.intervals]
            print(f"{policy:18s} {capacity:8.3f} " + " ".join(f"{rate:9.1%}" for rate in rates), flush=True)
            rows.append({"policy": policy, "capacity": capacity, "hit_rates": rates})
    document = {"benchmark": "replay", "trace": args.trace.name, "steps": len(trace["selected"])}
    document |= {"intervals": args.intervals, "churn": heads.round(4).tolist(), "working_sets": sets, "rows": rows}
    print(json.dumps(document))


if __name__ == "__main__":
    main()

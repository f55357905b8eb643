"""Draw what bench_host_attention.py measured: GB/s of KV by group size, under the limits of memory and arithmetic.

A group of g query heads makes g multiply-adds of each number that is read, so that the group size is the arithmetic
intensity (in multiply-adds a number) and this is a roofline picture.

Usage: python benchmarks/draw_roofline.py RESULT.json docs/roofline.svg [--dim 128]
RESULT.json is the benchmark's last line.
"""

import argparse
import json
import math
from pathlib import Path

from svg import Svg

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 760, 440, 64, 56, 48, 168
COLOURS = {"amx": "#c0392b", "avx512_bf16": "#2471a3", "avx512": "#7d3c98", "avx2": "#1e8449", "neon": "#c0392b"}
PEERS = {"sdpa": "#7f8c8d", "torch_native": "#b2babb"}


class Plot:
    """An SVG of curves over group sizes; x by order, y logarithmic in GB/s."""

    def __init__(self, groups: list[int], low: float, high: float, title: str):
        self.groups, self.low, self.high = groups, low, high
        self.picture = Svg(WIDTH, HEIGHT)
        self.picture.text(LEFT, 24, title, size=14, colour="black")
        self.labels: list[tuple[float, str, str]] = []
        for group in groups:
            self.picture.text(self.x(group), HEIGHT - BOTTOM + 18, str(group), "middle")
        self.picture.text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14, "query heads a KV head (group)", "middle")
        for value in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000):
            if low <= value <= high:
                y = self.y(value)
                self.picture.line([(LEFT, y), (WIDTH - RIGHT, y)])
                self.picture.text(LEFT - 8, y + 4, str(value), "end")
        self.picture.text(LEFT - 8, TOP - 6, "GB/s of KV", "middle")

    def x(self, group: int) -> float:
        return LEFT + 20 + self.groups.index(group) * (WIDTH - LEFT - RIGHT - 40) / max(len(self.groups) - 1, 1)

    def y(self, value: float) -> float:
        span = math.log(self.high / self.low)
        return HEIGHT - BOTTOM - math.log(max(value, self.low) / self.low) / span * (HEIGHT - BOTTOM - TOP)

    def curve(self, name: str, rates: dict[int, float], colour: str, dash: str = ""):
        points = [(self.x(group), self.y(rate / 1e9)) for group, rate in rates.items()]
        self.picture.line(points, colour, 2, dash)
        if not dash:
            for x, y in points:
                self.picture.dot(x, y, colour)
        self.labels.append((points[-1][1], name, colour))

    def svg(self) -> str:
        last = TOP
        for y, name, colour in sorted(self.labels):  # pushed down where they would meet
            last = max(y, last + 14)
            self.picture.text(WIDTH - RIGHT + 8, last + 4, name, colour=colour)
        return str(self.picture)


def draw(document: dict, dim: int) -> str:
    rows = [row for row in document["rows"] if row["dim"] == dim]
    threads = max(row["threads"] for row in rows)
    batch = max(row["batch"] for row in rows)
    rows = [row for row in rows if row["threads"] == threads and row["batch"] == batch]
    groups = [row["group"] for row in rows]
    everything = [rate for row in rows for part in ("kernels", "cached", "peers") for rate in row[part].values()]
    low, high = (limit(everything) / 1e9 for limit in (min, max))
    title = f"CPU decode attention, bf16, head dim {dim}, batch {batch}, {threads} threads, {document['cpu']}"
    plot = Plot(groups, low * 0.8, high * 1.2, title)
    plot.curve("streaming read", {row["group"]: row["stream"] for row in rows}, "#17202a", "6 4")
    for name in rows[0]["kernels"]:
        colour = COLOURS.get(name, "#17202a")
        plot.curve(f"{name}, cached", {row["group"]: row["cached"][name] for row in rows}, colour, "2 3")
        plot.curve(name, {row["group"]: row["kernels"][name] for row in rows}, colour)
    for name, colour in PEERS.items():
        plot.curve(name, {row["group"]: row["peers"][name] for row in rows}, colour)
    return plot.svg()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--dim", type=int, default=128)
    args = parser.parse_args()
    args.picture.write_text(draw(json.loads(args.result.read_text().splitlines()[-1]), args.dim))


if __name__ == "__main__":
    main()

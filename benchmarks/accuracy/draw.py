"""Accuracy against the budget: `python -m benchmarks.accuracy.draw RESULT.json OUT.svg [--context 32768]`.

RESULT.json is the last line of `benchmarks.accuracy`. A panel for each task and for the loss, a curve for each system;
those without a budget are dashed.
"""

import argparse
import json
import math
from pathlib import Path

from benchmarks.svg import Svg

PANEL, GAP, LEFT, TOP, LEGEND = 200, 56, 56, 64, 170
COLOURS = ("#c0392b", "#2471a3", "#1e8449", "#7d3c98", "#d68910", "#16a085")
PLAIN = {"dense": "#2c3e50", "window": "#7f8c8d"}
NOT_MEASURES = ("system", "context", "budget")


def draw(document: dict, context: int | None = None) -> str:
    """The picture of one context, by default the longest.

    Raises:
        ValueError: the document has no rows of that context
    """
    context = context or max(row["context"] for row in document["rows"])
    rows = [row for row in document["rows"] if row["context"] == context]
    if not rows:
        legal = sorted({row["context"] for row in document["rows"]})
        raise ValueError(f"--context is {context}; legal: {', '.join(map(str, legal))}")
    measures = [name for name in rows[0] if name not in NOT_MEASURES]
    curves: dict[str, list[dict]] = {}
    for row in rows:
        curves.setdefault(row["system"], []).append(row)
    shares = sorted({row["budget"] / context for row in rows if row["budget"]})
    low, high = (math.log2(shares[0]), math.log2(shares[-1])) if shares else (-6, -2)
    svg = Svg(LEFT + len(measures) * (PANEL + GAP) + LEGEND, TOP + PANEL + 60)
    svg.text(LEFT, 24, f"{Path(str(document['options']['model'])).name}, {context} tokens", size=14)
    names = [name for name in curves if name not in PLAIN]
    colours = PLAIN | {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    for number, measure in enumerate(measures):
        values = [row[measure] for row in rows]
        span = (min(values), max(values)) if measure == "loss" else (0.0, 1.0)
        panel = Panel(svg, LEFT + number * (PANEL + GAP), measure, span, (low, high))
        for name, points in curves.items():
            panel.curve([(row["budget"] and math.log2(row["budget"] / context), row[measure]) for row in points],
                        colours[name])  # fmt: skip
    for number, name in enumerate(curves):
        svg.text(LEFT + len(measures) * (PANEL + GAP), TOP + 14 + 18 * number, name, colour=colours[name])
    return str(svg)


class Panel:
    """One measure over budgets; x by the logarithm of the budget's share of the context."""

    def __init__(self, svg: Svg, left: float, title: str, span: tuple[float, float], budgets: tuple[float, float]):
        self.svg, self.left, self.span, self.budgets = svg, left, span, budgets
        svg.text(left + PANEL / 2, TOP - 12, title, "middle")
        for step in range(5):
            value = span[0] + (span[1] - span[0]) * step / 4
            svg.line([(left, self.y(value)), (left + PANEL, self.y(value))])
            svg.text(left - 6, self.y(value) + 4, f"{value:.3f}" if title == "loss" else f"{value:.0%}", "end", 10)
        for power in range(math.ceil(budgets[0]), math.floor(budgets[1]) + 1):
            svg.text(self.x(power), TOP + PANEL + 16, f"1/{2**-power:g}", "middle", 10)
        svg.text(left + PANEL / 2, TOP + PANEL + 34, "budget, of the context", "middle", 10)

    def x(self, power: float) -> float:
        first, last = self.budgets
        return self.left + 10 + (power - first) / max(last - first, 1e-9) * (PANEL - 20)

    def y(self, value: float) -> float:
        low, high = self.span
        return TOP + PANEL - (value - low) / max(high - low, 1e-9) * PANEL

    def curve(self, points: list[tuple[float | None, float]], colour: str):
        if points[0][0] is None:
            height = self.y(points[0][1])
            return self.svg.line([(self.left, height), (self.left + PANEL, height)], colour, 1.5, "5 4")
        places = [(self.x(power), self.y(value)) for power, value in sorted(points)]
        self.svg.line(places, colour, 2)
        for x, y in places:
            self.svg.dot(x, y, colour)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--context", type=int)
    args = parser.parse_args(argv)
    args.out.write_text(draw(json.loads(args.result.read_text().splitlines()[-1]), args.context))


if __name__ == "__main__":
    main()

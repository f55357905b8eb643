"""Draw a load as bench_load.py sampled it: requests that decode and wait, and a step's time, predicted and measured.

Usage: python benchmarks/draw_load.py RESULT.json docs/load.svg
RESULT.json is the benchmark's last line; its last row with samples is drawn.
"""

import argparse
import json
import math
from pathlib import Path

from svg import Svg

WIDTH, LEFT, RIGHT, TOP, HIGH, GAP = 760, 56, 20, 52, 150, 48
DECODING, WAITING = ("transactions_decoding", "decoding", "#2471a3"), ("transactions_waiting", "waiting", "#e67e22")
PREDICTED = ("predicted_step_seconds", "predicted", "#c0392b")
MEASURED = ("measured_step_seconds", "measured", "#2c3e50")
BANDS = (("requests", (DECODING, WAITING), 1), ("ms a step", (PREDICTED, MEASURED), 1000))


def round_up(value: float) -> float:
    """To a number whose quarters are round."""
    unit = 4.0 * 10 ** math.floor(math.log10(max(value, 1e-9) / 4))
    return next(unit * step for step in (1, 2, 3, 5, 10) if unit * step >= value)


def draw(row: dict) -> Svg:
    samples = row["samples"]
    ends = samples[-1]["at"]
    picture = Svg(WIDTH, TOP + 2 * (HIGH + GAP))
    title = f"{row['requests']} requests, {row['rate']:g} a second on average"
    picture.text(LEFT, 20, title, size=14, colour="black")
    for number, (unit, curves, factor) in enumerate(BANDS):
        top = TOP + number * (HIGH + GAP)
        highest = round_up(max(one[name] * factor for one in samples for name, *_ in curves))
        across = lambda at: LEFT + (WIDTH - LEFT - RIGHT) * at / ends  # noqa: E731
        up = lambda value: top + HIGH * (1 - value / highest)  # noqa: B023, E731
        for tick in range(5):
            value = highest * tick / 4
            picture.line([(LEFT, up(value)), (WIDTH - RIGHT, up(value))])
            picture.text(LEFT - 6, up(value) + 4, f"{value:g}", "end", 10)
        picture.text(LEFT - 6, top - 10, unit, "middle", 11)
        x = LEFT + 60.0
        for name, label, colour in curves:
            points = [(across(one["at"]), up(one[name] * factor)) for one in samples if one[name] or factor == 1]
            picture.line(points, colour, 1.6)
            picture.box(x, top - 19, 12, 4, colour)
            picture.text(x + 18, top - 12, label, size=11)
            x += 110
    for second in range(0, int(ends) + 1, max(int(ends) // 8, 1)):
        picture.text(across(second), TOP + 2 * HIGH + GAP + 18, f"{second} s", "middle", 10)
    return picture


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    rows = [row for row in json.loads(args.result.read_text())["rows"] if row["samples"]]
    if not rows:
        parser.error(f"{args.result}: no row has samples; they are taken of RheoServe")
    args.picture.write_text(str(draw(rows[-1])))


if __name__ == "__main__":
    main()

"""Draw a decode step's time as the latency model predicted it, against what was measured, of bench_decode.py's rows.

Usage: python benchmarks/draw_prediction.py RESULT.json [RESULT.json ...] docs/prediction.svg
A RESULT.json is the benchmark's last line. The dashed lines are a tenth more and a tenth less.
"""

import statistics

from svg import Svg, draw_results

SIDE, LEFT, TOP, RIGHT, BOTTOM = 420, 64, 56, 150, 56
COLOURS = ("#2471a3", "#e67e22", "#16a085", "#8e44ad", "#c0392b")
BAND = 0.1


def pairs(rows: list[dict]) -> list[tuple[int, int, float, float]]:
    """(context, requests, predicted, measured) in ms, of rows that have both."""
    there = [row for row in rows if row.get("predicted_ms") and row.get("windows_ms")]
    return sorted((row["context"], row["requests"], row["predicted_ms"], row["windows_ms"]) for row in there)


def off_by(found: list[tuple[int, int, float, float]]) -> float:
    """The median of how far a prediction is off, as a share of what was measured."""
    return statistics.median(abs(predicted / measured - 1) for *_, predicted, measured in found)


def draw(found: list[tuple[int, int, float, float]]) -> Svg:
    """A picture of `pairs`."""
    highest = 5 * (int(max(max(one[2:]) for one in found) * 1.1 / 5) + 1)
    across = lambda value: LEFT + SIDE * value / highest  # noqa: E731
    up = lambda value: TOP + SIDE * (1 - value / highest)  # noqa: E731
    picture = Svg(LEFT + SIDE + RIGHT, TOP + SIDE + BOTTOM)
    title = f"A decode step, ms: predicted within {off_by(found):.1%} of measured (median of {len(found)})"
    picture.text(LEFT, 20, title, size=14, colour="black")
    for tick in range(0, highest + 1, 5):
        picture.line([(across(0), up(tick)), (across(highest), up(tick))])
        picture.text(LEFT - 8, up(tick) + 4, str(tick), "end")
        picture.text(across(tick), TOP + SIDE + 18, str(tick), "middle")
    picture.text(LEFT + SIDE / 2, TOP + SIDE + 40, "measured", "middle")
    picture.text(8, TOP - 12, "predicted")
    for share in (1 - BAND, 1 + BAND):
        ends = min(highest, highest / share)
        picture.line([(across(0), up(0)), (across(ends), up(ends * share))], "#bdc3c7", 1, "4 3")
    picture.line([(across(0), up(0)), (across(highest), up(highest))], "#95a5a6")
    contexts = sorted({one[0] for one in found})
    for context, requests, predicted, measured in found:
        colour = COLOURS[contexts.index(context) % len(COLOURS)]
        picture.dot(across(measured), up(predicted), colour)
        picture.text(across(measured) + 5, up(predicted) + 12, str(requests), size=9, colour=colour)
    for place, context in enumerate(contexts):
        y = TOP + 20 + 20 * place
        picture.dot(LEFT + SIDE + 20, y - 4, COLOURS[place % len(COLOURS)])
        picture.text(LEFT + SIDE + 30, y, f"{context:,} tokens")
    picture.text(LEFT + SIDE + 16, TOP + 24 + 20 * len(contexts), "numbers: requests", size=10)
    return picture


def main():
    draw_results(__doc__, pairs, draw, "no row has a prediction and a measurement")


if __name__ == "__main__":
    main()

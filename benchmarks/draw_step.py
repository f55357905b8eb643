"""Draw where the GPU's time of a decode step goes, as bench_decode.py --profile split it: one stacked bar a row.

Usage: python benchmarks/draw_step.py RESULT.json [RESULT.json ...] docs/step.svg
A RESULT.json is the benchmark's last line.
"""

from svg import Svg, draw_results

WIDTH, LEFT, RIGHT, TOP, BAR, GAP, BOTTOM = 760, 150, 70, 64, 26, 16, 36
PARTS = {
    "weights": "#7f8c8d",
    "resident": "#2471a3",
    "score and plan": "#e67e22",
    "synthetic gate": "#f5cba7",
    "append": "#16a085",
    "swap": "#8e44ad",
    "merge and wait": "#c0392b",
    "other": "#bdc3c7",
    "between kernels": "#ecf0f1",
}


def profiled(rows: list[dict]) -> list[dict]:
    return [row for row in rows if "split_ms" in row]


def whole(row: dict) -> float:
    return sum(row["split_ms"].get(part, 0.0) for part in PARTS)


def draw(rows: list[dict]) -> Svg:
    """A picture of benchmark rows that have a split."""
    longest = max(map(whole, rows))
    scale = (WIDTH - LEFT - RIGHT) / longest
    height = TOP + len(rows) * (BAR + GAP) + BOTTOM
    picture = Svg(WIDTH, height)
    picture.text(LEFT, 20, "GPU time of a decode step, ms", size=14, colour="black")
    x = 8.0
    for part, colour in PARTS.items():
        picture.box(x, 34, 12, 12, colour)
        picture.text(x + 16, 44, part, size=11)
        x += 26 + 5.8 * len(part)
    for number, row in enumerate(rows):
        top, x = TOP + number * (BAR + GAP), float(LEFT)
        many = "s" if row["requests"] > 1 else ""
        picture.text(LEFT - 8, top + 12, f"{row['requests']} request{many}", "end")
        picture.text(LEFT - 8, top + 26, f"{row['context']:,} tokens each", "end", size=10)
        for part, colour in PARTS.items():
            took = row["split_ms"].get(part, 0.0)
            wide = took * scale
            picture.box(x, top, wide, BAR, colour)
            if wide > 26:
                shade = "#2c3e50" if colour in ("#bdc3c7", "#ecf0f1", "#f5cba7") else "white"
                picture.text(x + wide / 2, top + 17, f"{took:.1f}", "middle", 10, shade)
            x += wide
        picture.text(x + 6, top + 17, f"{whole(row):.1f}")
    note = "what copies blocks and what the CPU attends to meanwhile goes on beside these"
    picture.text(LEFT, height - 12, note, size=10, colour="#7f8c8d")
    return picture


def main():
    draw_results(__doc__, profiled, draw, "no row was profiled; run bench_decode.py --profile")


if __name__ == "__main__":
    main()

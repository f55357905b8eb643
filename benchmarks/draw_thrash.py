"""Draw what two servers' logs say of the same load: the CPU's share of what is attended to, and tokens a second.

Usage: python benchmarks/draw_thrash.py off/rheoserve.log on/rheoserve.log docs/thrash.svg
The logs are those that bench_decode.py --logs kept, first without admission, then with it.
"""

import argparse
import re
from datetime import datetime
from pathlib import Path

from draw_load import GAP, HIGH, LEFT, RIGHT, TOP, WIDTH, round_up
from svg import Svg

LINE = re.compile(
    r"\[(?P<at>[\d-]+ [\d:]+)[^]]*\] Decode batch.*#running-req: (?P<running>\d+).*host share: (?P<share>[\d.]+).*"
    r"gen throughput \(token/s\): (?P<rate>[\d.]+)"
)
COLOURS = (("admission off", "#c0392b"), ("admission on", "#2471a3"))
BANDS = (("share of the blocks attended to that the CPU attends to", "share"), ("tokens a second", "rate"))


def read(log: Path) -> list[dict]:
    """Lines of steps in which several requests decoded, with the seconds since the first."""
    found = [match.groupdict() for match in map(LINE.search, log.read_text().splitlines()) if match]
    lines = [{name: line[name] if name == "at" else float(line[name]) for name in line} for line in found]
    times = [datetime.fromisoformat(line["at"]).timestamp() for line in lines]
    return [{**line, "at": at - times[0]} for line, at in zip(lines, times, strict=True) if line["running"] > 1]


def draw(servers: list[list[dict]]) -> Svg:
    ends = max(line["at"] for lines in servers for line in lines) or 1
    picture = Svg(WIDTH, TOP + 2 * (HIGH + GAP))
    for number, (title, name) in enumerate(BANDS):
        top = TOP + number * (HIGH + GAP)
        highest = 1.0 if name == "share" else round_up(max(line[name] for lines in servers for line in lines))
        for tick in range(5):
            y, value = top + HIGH * (1 - tick / 4), highest * tick / 4
            picture.line([(LEFT, y), (WIDTH - RIGHT, y)])
            picture.text(LEFT - 6, y + 4, f"{value:.0%}" if name == "share" else f"{value:g}", "end", 10)
        picture.text(LEFT, top - 12, title, size=11)
        for (_, colour), lines in zip(COLOURS, servers, strict=True):
            picture.line(
                [
                    (LEFT + (WIDTH - LEFT - RIGHT) * line["at"] / ends, top + HIGH * (1 - line[name] / highest))
                    for line in lines
                ],
                colour,
                1.6,
            )
    for place, (label, colour) in enumerate(COLOURS):
        picture.box(LEFT + 250 + 140 * place, 16, 12, 4, colour)
        picture.text(LEFT + 268 + 140 * place, 23, label, size=11)
    for second in range(0, int(ends) + 1, max(int(ends) // 8, 1)):
        picture.text(
            LEFT + (WIDTH - LEFT - RIGHT) * second / ends, TOP + 2 * HIGH + GAP + 18, f"{second} s", "middle", 10
        )
    return picture


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("off", "on", "picture"):
        parser.add_argument(name, type=Path)
    args = parser.parse_args()
    servers = [read(log) for log in (args.off, args.on)]
    for log, lines in zip((args.off, args.on), servers, strict=True):
        if not lines:
            parser.error(f"{log}: no decode line of several requests with a host share")
    args.picture.write_text(str(draw(servers)))


if __name__ == "__main__":
    main()

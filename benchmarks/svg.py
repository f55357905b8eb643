"""A drawing in SVG: texts, lines and rectangles by their coordinates; and the program that draws results."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path


class Svg:
    def __init__(self, width: float, height: float):
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" font-family="sans-serif" '
            'font-size="12">',
            f'<rect width="{width:g}" height="{height:g}" fill="white"/>',
        ]

    def text(self, x: float, y: float, text: str, anchor: str = "start", size: int = 12, colour: str = "#2c3e50"):
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">{text}</text>'
        )

    def line(self, points: list[tuple[float, float]], colour: str = "#e5e7e9", width: float = 1, dash: str = ""):
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        self.parts.append(
            f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width:g}" stroke-dasharray="{dash}"/>'
        )

    def box(self, x: float, y: float, width: float, height: float, colour: str):
        self.parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.2f}" height="{height:.2f}" fill="{colour}"/>')

    def dot(self, x: float, y: float, colour: str):
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')

    def __str__(self) -> str:
        return "\n".join([*self.parts, "</svg>", ""])


def draw_results(usage: str, wanted: Callable[[list[dict]], list], draw: Callable[[list], Svg], lacking: str):
    """Read benchmarks' last lines, and write the picture of their rows: files by command-line argument.

    Args:
        usage: of the program
        wanted: what of all rows is drawn
        lacking: what is said where that is nothing
    """
    parser = argparse.ArgumentParser(description=usage, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    found = wanted([row for path in args.results for row in json.loads(path.read_text())["rows"]])
    if not found:
        parser.error(f"{', '.join(map(str, args.results))}: {lacking}")
    args.picture.write_text(str(draw(found)))

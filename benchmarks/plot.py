"""How a step grows: tables and a figure for docs/performance.md, from what `step` and `memory` wrote with `--vary`.

  python -m benchmarks.step --vary batch 1 2 4 8 --only sft_response dwa_kd response_dskd published_dskd
  python -m benchmarks.memory --vary batch 2 4 8 16 --only sft_response dwa_kd
  python -m benchmarks.plot

Reads `step-FIELD.json` and `memory-FIELD.json` for batch, length, vocab and teacher_hidden, those that are there;
writes the tables between the document's marks `<!-- growth -->` and `<!-- /growth -->`, and the figure beside it.
"""

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

from benchmarks.workload import RESULTS

PANELS = {
    "batch": ("batch", "examples in a batch"),
    "length": ("length", "tokens in an example"),
    "vocab": ("teacher_vocab", "tokens of vocabulary, both sides"),
    "teacher_hidden": ("teacher_hidden", "teacher's width"),
}
"""By what was varied: where its value stands in `sizes`, and what it is called."""
LINES = {
    "published_dskd": ("DSKD as published", "#7a7a7a"),
    "response_dskd": ("DSKD, response rows", "#3b75af"),
    "dwa_kd": ("DWA-KD", "#c03d3e"),
    "sft_response": ("SFT, response rows", "#3a923a"),
}
MARKS = re.compile("(<!-- growth -->\n).*?(<!-- /growth -->)", re.DOTALL)
WIDTH, HEIGHT = 380, 250
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 12, 38

Points = list[tuple[float, dict[str, float]]]


def points_of(folder: Path, benchmark: str, measured: str, unit: float = 1.0) -> dict[str, Points]:
    """By what was varied: its values and what each step takes there; a step that ran out of memory is absent."""
    found = {}
    for varied, (field, _) in PANELS.items():
        path = folder / f"{benchmark}-{varied}.json"
        if path.exists():
            results: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["results"]
            found[varied] = [
                (result["sizes"][field], {name: taken / unit for name, taken in result[measured].items() if taken})
                for result in results
            ]
    return found


def table(found: dict[str, Points], unit: str) -> str:
    """What DWA-KD takes, and the others as multiples of it."""
    measured = {name for points in found.values() for _, taken in points for name in taken}
    others = [name for name in LINES if name in measured - {"dwa_kd"}]
    lines = [
        f"| | DWA-KD, {unit} | {' | '.join(LINES[name][0] for name in others)} |",
        "|---" * (len(others) + 2) + "|",
    ]
    for varied, points in found.items():
        for value, taken in points:
            ratios = [f"{taken[name] / taken['dwa_kd']:.2f} x" if name in taken else "" for name in others]
            lines.append(f"| {PANELS[varied][1]}: {value:,} | {taken['dwa_kd']:.2f} | {' | '.join(ratios)} |")
    return "\n".join(lines) + "\n"


class Scale:
    """Numbers to pixels, both axes logarithmic."""

    def __init__(self, low: float, high: float, first: float, last: float) -> None:
        self.low, self.first = math.log(low), first
        self.factor = (last - first) / (math.log(high) - self.low)

    def __call__(self, value: float) -> float:
        return self.first + (math.log(value) - self.low) * self.factor


def text(x: float, y: float, words: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{words}</text>'


def panel(points: Points, title: str, low: float, high: float) -> str:
    """One set of axes with a line for each step, at the origin."""
    values = [value for value, _ in points]
    across = Scale(min(values) / 1.1, max(values) * 1.1, LEFT, WIDTH - RIGHT)
    up = Scale(low, high, HEIGHT - BOTTOM, TOP)
    parts = [text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, title)]
    for tick in (mantissa * 10**power for power in range(-3, 4) for mantissa in (1, 2, 5)):
        if low <= tick <= high:
            y = up(tick)
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            parts.append(text(LEFT - 6, y + 4, f"{tick:g}", "end"))
    parts += [text(across(value), HEIGHT - BOTTOM + 16, f"{value:,}") for value in values]
    for name, (_, colour) in LINES.items():
        marks = [(across(value), up(seconds[name])) for value, seconds in points if name in seconds]
        if marks:
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in marks)
            parts.append(f'<polyline stroke="{colour}" points="{line}"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in marks]
    return "\n".join(parts)


def figure(found: dict[str, Points]) -> str:
    """An SVG with a panel for each thing varied, two in a row, over the same range of seconds."""
    seconds = [row[name] for points in found.values() for _, row in points for name in LINES if name in row]
    low, high = min(seconds) / 1.2, max(seconds) * 1.2
    total = 2 * WIDTH, math.ceil(len(found) / 2) * HEIGHT + 50
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total[0]} {total[1]}" font-family="sans-serif" '
        'font-size="12">',
        "<style>.grid{stroke:#ddd}polyline{fill:none;stroke-width:2}</style>",
        '<rect width="100%" height="100%" fill="white"/>',
        text(LEFT, 18, "Seconds of one training step, both axes logarithmic", "start"),
    ]
    for number, (label, colour) in enumerate(LINES.values()):
        x = LEFT + number * (2 * WIDTH - LEFT) / len(LINES)
        parts += [f'<circle cx="{x:.0f}" cy="34" r="4" fill="{colour}"/>', text(x + 9, 38, label, "start")]
    for number, (varied, points) in enumerate(found.items()):
        place = f"translate({number % 2 * WIDTH} {50 + number // 2 * HEIGHT})"
        parts.append(f'<g transform="{place}">\n{panel(points, PANELS[varied][1], low, high)}\n</g>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    docs = RESULTS.parents[1] / "docs"
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--document", type=Path, default=docs / "performance.md", help="gets the table")
    parser.add_argument("--figure", default="performance-growth.svg", help="its name beside the document")
    options = parser.parse_args()
    seconds = points_of(options.results, "step", "median_seconds")
    gigabytes = points_of(options.results, "memory", "peak_bytes", 1e9)
    picture = f"![Seconds of a step over batch, length, vocabulary and width]({options.figure})"
    parts = [table(seconds, "s"), picture + "\n", *([table(gigabytes, "GB")] if gigabytes else [])]
    (options.document.parent / options.figure).write_text(figure(seconds), encoding="utf-8")
    document = options.document.read_text(encoding="utf-8")
    shown = "\n" + "\n".join(parts) + "\n"
    options.document.write_text(MARKS.sub(lambda marks: marks[1] + shown + marks[2], document), encoding="utf-8")
    print(shown)


if __name__ == "__main__":
    main()

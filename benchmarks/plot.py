"""A figure with a panel for each thing varied, drawn as SVG: small, and the same bytes for the same numbers."""

import math

Points = list[tuple[float, dict[str, float]]]
"""Values of what varies, and what each contestant takes there."""
Lines = dict[str, tuple[str, str]]
"""Of each contestant: what it is called, and its colour."""

WIDTH, HEIGHT = 380, 250
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 12, 38


class Scale:
    """Numbers to pixels, both axes logarithmic."""

    def __init__(self, low: float, high: float, first: float, last: float) -> None:
        self.low, self.first = math.log(low), first
        self.factor = (last - first) / (math.log(high) - self.low)

    def __call__(self, value: float) -> float:
        return self.first + (math.log(value) - self.low) * self.factor


def text(x: float, y: float, words: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{words}</text>'


def panel(title: str, points: Points, lines: Lines, low: float, high: float) -> str:
    """One set of axes with a line for each contestant, at the origin."""
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
    for name, (_, colour) in lines.items():
        marks = [(across(value), up(taken[name])) for value, taken in points if name in taken]
        if marks:
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in marks)
            parts.append(f'<polyline stroke="{colour}" points="{line}"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in marks]
    return "\n".join(parts)


def figure(title: str, panels: dict[str, Points], lines: Lines) -> str:
    """An SVG with a panel for each thing varied, two in a row, over the same range."""
    every = [row[name] for points in panels.values() for _, row in points for name in lines if name in row]
    low, high = min(every) / 1.2, max(every) * 1.2
    total = 2 * WIDTH, math.ceil(len(panels) / 2) * HEIGHT + 50
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total[0]} {total[1]}" font-family="sans-serif" '
        'font-size="12">',
        "<style>.grid{stroke:#ddd}polyline{fill:none;stroke-width:2}</style>",
        '<rect width="100%" height="100%" fill="white"/>',
        text(LEFT, 18, f"{title}, both axes logarithmic", "start"),
    ]
    for number, (label, colour) in enumerate(lines.values()):
        x = LEFT + number * (2 * WIDTH - LEFT) / len(lines)
        parts += [f'<circle cx="{x:.0f}" cy="34" r="4" fill="{colour}"/>', text(x + 9, 38, label, "start")]
    for number, (name, points) in enumerate(panels.items()):
        place = f"translate({number % 2 * WIDTH} {50 + number // 2 * HEIGHT})"
        parts.append(f'<g transform="{place}">\n{panel(name, points, lines, low, high)}\n</g>')
    return "\n".join([*parts, "</svg>"]) + "\n"

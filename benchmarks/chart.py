"""The chart of a run, as SVG: how many times as fast as TensorFlow, over the ids in a call."""

from __future__ import annotations

import math
from xml.sax.saxutils import escape

PANEL_WIDTH, PANEL_HEIGHT = 360, 220
LEFT, TOP, GAP, BOTTOM = 56, 72, 64, 48
# Told apart without colour vision too: each width has its own marker.
STYLES = (("#0072b2", "circle"), ("#d55e00", "square"), ("#009e73", "diamond"), ("#cc79a7", "triangle"))
DASHES = {"function": "", "eager": "5 4"}


def _text(x: float, y: float, content: str, anchor: str = "middle", size: int = 12, extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"{extra}>{escape(content)}</text>'


def _marker(shape: str, x: float, y: float, colour: str) -> str:
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>'
    if shape == "square":
        return f'<rect x="{x - 3:.1f}" y="{y - 3:.1f}" width="6" height="6" fill="{colour}"/>'
    points = {"diamond": [(0, -4.5), (4.5, 0), (0, 4.5), (-4.5, 0)], "triangle": [(0, -4.5), (4.5, 3.5), (-4.5, 3.5)]}
    corners = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in points[shape])
    return f'<polygon points="{corners}" fill="{colour}"/>'


def _ratio(record: dict) -> float:
    return record["peers"]["hps"]["ratio"]


class _Panel:
    """One coordinate system, both axes logarithmic."""

    def __init__(self, x: float, y: float, keys: list[int], ratios: list[float]):
        self._x, self._y = x, y
        self._low_keys, self._high_keys = math.log2(min(keys)), math.log2(max(max(keys), 2 * min(keys)))
        self._low, self._high = math.log2(min(*ratios, 0.5)), math.log2(max(*ratios, 2.0))

    def x(self, keys: float) -> float:
        share = (math.log2(keys) - self._low_keys) / (self._high_keys - self._low_keys)
        return self._x + share * PANEL_WIDTH

    def y(self, ratio: float) -> float:
        share = (math.log2(ratio) - self._low) / (self._high - self._low)
        return self._y + (1 - share) * PANEL_HEIGHT

    def frame(self, title: str, keys: list[int]) -> list[str]:
        parts = [
            f'<rect x="{self._x}" y="{self._y}" width="{PANEL_WIDTH}" height="{PANEL_HEIGHT}" fill="none" '
            'stroke="#999"/>',
            _text(self._x + PANEL_WIDTH / 2, self._y - 8, title, size=13, extra=' font-weight="bold"'),
            _text(self._x + PANEL_WIDTH / 2, self._y + PANEL_HEIGHT + 34, "ids in a call"),
        ]
        for power in range(math.ceil(self._low), math.floor(self._high) + 1):
            y = self.y(2.0**power)
            stroke = 'stroke="#333"' if power == 0 else 'stroke="#ddd"'
            parts.append(f'<line x1="{self._x}" y1="{y:.1f}" x2="{self._x + PANEL_WIDTH}" y2="{y:.1f}" {stroke}/>')
            parts.append(_text(self._x - 6, y + 4, f"{2.0**power:g}", anchor="end"))
        for key in keys:
            name = f"{key // 1024} Ki" if key >= 1024 and key % 1024 == 0 else str(key)
            parts.append(_text(self.x(key), self._y + PANEL_HEIGHT + 16, name, size=10))
        return parts

    def line(self, points: list[tuple[int, float]], style: tuple[str, str], dash: str) -> list[str]:
        colour, shape = style
        places = [(self.x(keys), self.y(ratio)) for keys, ratio in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        parts = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"{dashes}/>']
        return parts + [_marker(shape, x, y, colour) for x, y in places]


def ratio_chart(lookups: list[dict]) -> str:
    """An SVG document with one panel for each form and distribution, one line for each width and kind of call."""
    panels = list(dict.fromkeys((record["form"], record["distribution"]) for record in lookups))
    widths = sorted({record["width"] for record in lookups})
    calls = [call for call in DASHES if any(record["call"] == call for record in lookups)]
    columns = min(2, max(1, len(panels)))
    lines = max(1, math.ceil(len(panels) / columns))
    width = LEFT + columns * (PANEL_WIDTH + GAP)
    height = TOP + lines * (PANEL_HEIGHT + GAP) + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" fill="#222">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        _text(width / 2, 22, "Lookups: times as fast as TensorFlow's own (above 1: faster)", size=15),
    ]
    ratios = [_ratio(record) for record in lookups]
    for number, (form, distribution) in enumerate(panels):
        records = [record for record in lookups if (record["form"], record["distribution"]) == (form, distribution)]
        keys = sorted({record["keys"] for record in records})
        x = LEFT + (number % columns) * (PANEL_WIDTH + GAP)
        y = TOP + (number // columns) * (PANEL_HEIGHT + GAP)
        panel = _Panel(x, y, keys, ratios)
        parts += panel.frame(f"{form}, {distribution} ids", keys)
        for call in calls:
            for i, row_width in enumerate(widths):
                points = [(r["keys"], _ratio(r)) for r in records if r["width"] == row_width and r["call"] == call]
                if points:
                    parts += panel.line(sorted(points), STYLES[i % len(STYLES)], DASHES[call])
    x, y = float(LEFT), height - 18
    for i, row_width in enumerate(widths):
        colour, shape = STYLES[i % len(STYLES)]
        parts += [_marker(shape, x, y - 4, colour), _text(x + 10, y, f"width {row_width}", anchor="start")]
        x += 90
    for call in calls:
        parts.append(
            f'<line x1="{x:.1f}" y1="{y - 4}" x2="{x + 30:.1f}" y2="{y - 4}" stroke="#333" stroke-width="1.8" '
            f'stroke-dasharray="{DASHES[call]}"/>'
        )
        parts.append(_text(x + 36, y, {"function": "tf.function", "eager": "eager op"}[call], anchor="start"))
        x += 130
    return "\n".join([*parts, "</svg>"]) + "\n"

"""Numbers and tables for people: binary prefixes, thousands, columns."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def bytes_text(count: float) -> str:
    """12.3 MiB"""
    for unit in _UNITS:
        if abs(count) < 1024 or unit == _UNITS[-1]:
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"


def parse_bytes(text: str) -> int:
    """The inverse, generous: "80G", "80 GiB", "1.5TiB", "4096". Powers of 1024. ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGTP]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if not match:
        raise ValueError(f"{text!r} is no amount of memory; write a number with a unit, such as 80GiB")
    power = "BKMGTP".index(match[2].upper() or "B")
    return int(float(match[1]) * 1024**power)


def count_text(count: int) -> str:
    """1,234,567"""
    return f"{count:,}"


def text_table(lines: Sequence[Sequence[str]], right: Collection[str] = ()) -> list[str]:
    """Lines of equal length in columns; columns whose head is in `right` are aligned to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  ".join(
            cell.rjust(width) if head in right else cell.ljust(width)
            for cell, width, head in zip(line, widths, lines[0], strict=True)
        ).rstrip()
        for line in lines
    ]

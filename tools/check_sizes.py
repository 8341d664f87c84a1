"""Fails when a source file is longer than LIMIT lines, unless REASONS says why it must be.

Usage: python tools/check_sizes.py FILE...
"""

import sys
from pathlib import Path

LIMIT = 800
REASONS = {
    "cc/tests/config_test.cc": "one case for each key and each refusal of ps.json",
    "cc/tests/store_conformance.cc": "all clauses of one contract",
}


def too_long(names: list[str]) -> list[str]:
    found = []
    for name in names:
        lines = Path(name).read_text(encoding="utf-8").count("\n")
        if lines > LIMIT and name not in REASONS:
            found.append(f"{name}:1: {lines} lines (limit {LIMIT}): split it, or say why in tools/check_sizes.py")
    return found


if __name__ == "__main__":
    problems = too_long(sys.argv[1:])
    print("\n".join(problems), end="\n" if problems else "")
    sys.exit(1 if problems else 0)

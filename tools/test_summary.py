"""Adds up JUnit files and prints one line: "N passed, N failed, N skipped". Exit code 1 if any test failed or none ran.

Usage: python tools/test_summary.py NAME=FILE...
"""

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path


def count(path: Path) -> tuple[int, int, int]:
    """Returns (passed, failed, skipped) of one JUnit file; a missing file is one failure."""
    if not path.exists():
        return 0, 1, 0
    root = ElementTree.parse(path).getroot()
    suites = [root] if root.tag == "testsuite" else root.findall("testsuite")
    total, failed, skipped = 0, 0, 0
    for suite in suites:
        total += int(suite.get("tests", 0))
        failed += int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        skipped += int(suite.get("skipped", 0)) + int(suite.get("disabled", 0))
    return total - failed - skipped, failed, skipped


def main(arguments: list[str]) -> int:
    totals = [0, 0, 0]
    print()
    for argument in arguments:
        name, _, path = argument.partition("=")
        counts = count(Path(path))
        totals = [a + b for a, b in zip(totals, counts, strict=True)]
        print(f"{name:8} {counts[0]:6} passed {counts[1]:4} failed {counts[2]:4} skipped")
    print("{} passed, {} failed, {} skipped".format(*totals))
    return 1 if totals[1] or not totals[0] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

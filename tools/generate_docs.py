"""Writes the generated pages, or with --check says which of them are out of date (exit code 1).

`./dev docs` runs this; docs/configuration.md is written and checked by the native test config_test.
"""

import json
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The table of numbers in README.md is a copy of what the benchmark harness wrote.
NUMBERS = "benchmarks/results/summary.md"
NUMBERS_PLACE = re.compile(rf"(<!-- {NUMBERS} -->\n).*?(<!-- end -->)", re.DOTALL)


def schema() -> str:
    os.environ["HPS_TENSORFLOW"] = "off"  # not needed here, and slow to import
    from hierarchical_parameter_server.config import json_schema

    return json.dumps(json_schema(), indent=2) + "\n"


def readme() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    numbers = ROOT / NUMBERS
    if not numbers.exists():
        return text
    table = numbers.read_text(encoding="utf-8").strip() + "\n"
    filled, places = NUMBERS_PLACE.subn(lambda place: place[1] + table + place[2], text)
    if places != 1:
        sys.exit(f"README.md: {places} places for {NUMBERS}, expected 1")
    return filled


PAGES = {"docs/ps.schema.json": schema, "README.md": readme}


def main(arguments: list[str]) -> int:
    outdated = []
    for name, generate in PAGES.items():
        path, text = ROOT / name, generate()
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        outdated.append(name)
        if "--check" not in arguments:
            path.write_text(text, encoding="utf-8")
    if "--check" in arguments:
        for name in outdated:
            print(f"{name}:1: out of date: run ./dev docs")
        return 1 if outdated else 0
    print("written: " + (", ".join(outdated) or "nothing, all pages are up to date"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

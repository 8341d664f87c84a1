"""Writes the generated pages, or with --check says which of them are out of date (exit code 1).

`./dev docs` runs this; docs/configuration.md is written and checked by the native test config_test.
"""

import functools
import json
import os
import re
import sys
from pathlib import Path

import gpu_cache_page
import note_tables

ROOT = Path(__file__).resolve().parent.parent
# Tables of numbers in pages are copies of what the benchmarks wrote.
NUMBERS = {"README.md": "benchmarks/results/summary.md", "docs/operations.md": "benchmarks/results/tiers.md"}


def schema() -> str:
    os.environ["HPS_TENSORFLOW"] = "off"  # not needed here, and slow to import
    from hierarchical_parameter_server.config import json_schema

    return json.dumps(json_schema(), indent=2) + "\n"


def with_numbers(page: str) -> str:
    text = (ROOT / page).read_text(encoding="utf-8")
    numbers = ROOT / NUMBERS[page]
    if not numbers.exists():
        return text
    table = numbers.read_text(encoding="utf-8").strip() + "\n"
    place = re.compile(rf"(<!-- {NUMBERS[page]} -->\n).*?(<!-- end -->)", re.DOTALL)
    filled, places = place.subn(lambda found: found[1] + table + found[2], text)
    if places != 1:
        sys.exit(f"{page}: {places} places for {NUMBERS[page]}, expected 1")
    return filled


def with_tables(page: str) -> str:
    text = (ROOT / page).read_text(encoding="utf-8")
    place = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return place.sub(lambda found: found[1] + table(found[2]) + found[3], text)


def table(name: str) -> str:
    return gpu_cache_page.TABLES[name]() if name in gpu_cache_page.TABLES else note_tables.make(name)


NOTES = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs/design").glob("*.md"))]
PAGES = {
    "docs/ps.schema.json": schema,
    **{page: functools.partial(with_numbers, page) for page in NUMBERS},
    **{note: functools.partial(with_tables, note) for note in [*NOTES, "docs/gpu_cache.md"]},
    **gpu_cache_page.FIGURES,
}


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

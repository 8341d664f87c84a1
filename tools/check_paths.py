"""Fails when a page names a file of the repository that does not exist.

Looked at: relative links, and words in backticks that begin with a folder of the repository.
Usage: python tools/check_paths.py PAGE...
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = "cc|cmake|cuda_kernels|hierarchical_parameter_server|tools|tests|examples|benchmarks|notebooks|docs"
NAMED = re.compile(rf"`((?:{FOLDERS})/[^`\s*<]*)`")
LINKED = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def missing(page: Path) -> list[str]:
    found = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        paths = [ROOT / name for name in NAMED.findall(line)] + [page.parent / name for name in LINKED.findall(line)]
        found += [f"{page}:{number}: there is no {path.relative_to(ROOT)}" for path in paths if not path.exists()]
    return found


if __name__ == "__main__":
    problems = [problem for name in sys.argv[1:] for problem in missing((ROOT / name).resolve())]
    print("\n".join(problems), end="\n" if problems else "")
    sys.exit(1 if problems else 0)

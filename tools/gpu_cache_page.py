"""What docs/gpu_cache.md is made of besides its text: tables and figures, out of headers, pages and recorded runs.

tools/generate_docs.py puts TABLES between `<!-- table NAME -->` and `<!-- end -->`, and writes FIGURES as files.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from xml.sax.saxutils import escape

import note_tables

ROOT = Path(__file__).resolve().parent.parent
KEYS = (
    "gpucache",
    "deployed_device_list",
    "embedding_cache_type",
    "gpucacheper",
    "init_ec",
    "hit_rate_threshold",
    "default_value_for_each_table",
    "enable_pagelock",
    "fp8_quant",
    "refresh_delay",
    "refresh_interval",
    "cache_refresh_percentage_per_iteration",
    "max_batch_size",
    "maxnum_catfeature_query_per_table_per_sample",
    "num_of_worker_buffer_in_pool",
    "use_context_stream",
)
PEERS = ("NVE", "HKV", "HPS static", "HPS")
COLOURS = {"ceiling": "#888", "static": "#0072b2", "dynamic": "#56b4e9"}
COLOURS |= {"NVE": "#d55e00", "HKV": "#009e73", "HPS static": "#cc79a7", "HPS": "#a05a8a"}


# ---- records --------------------------------------------------------------------------------------------------------


def _last_run(name: str, kinds: tuple[str, ...]) -> tuple[dict, list[dict]]:
    return note_tables.last_run(note_tables.read(name), *kinds)


def _rate(keys: int, microseconds: float) -> float:
    return keys / microseconds / 1000  # thousand millions of keys a second


def _digits(rate: float) -> str:
    return f"{rate:.2f}" if rate >= 0.1 else f"{rate:.3f}"


def _ours() -> list[dict]:
    return _last_run("device_cache.jsonl", ("device_cache_hits",))[1]


def _peers() -> list[dict]:
    return _last_run("gpu_peers.jsonl", ("gpu_peer",))[1]


# ---- tables ---------------------------------------------------------------------------------------------------------


def runs() -> str:
    sources = {
        "the cache alone": ("device_cache.jsonl", ("device_cache_hits",)),
        "pooled": ("device_cache.jsonl", ("device_cache_pooled",)),
        "rows elsewhere or smaller": ("device_cache.jsonl", ("device_cache_rows",)),
        "TensorFlow": ("tensorflow_gpu.jsonl", ("gpu_op", "gpu_model")),
        "whole lookups": ("device_lookup.jsonl", ("device_lookup_hits", "device_lookup_misses")),
        "peers": ("gpu_peers.jsonl", ("gpu_peer",)),
    }
    lines = []
    for what, (name, kinds) in sources.items():
        run, _ = _last_run(name, kinds)
        machine = run.get("gpu") or run["machine"]
        lines.append([what, machine, run.get("commit", ""), run["date"], f"`benchmarks/results/{name}`"])
    return note_tables.table(["what", "machine", "commit", "date", "lines"], lines)


def _rates_table(zipf: float, with_wall: bool) -> str:
    """Ours and peers' rates over the keys in a call, as far as peers were measured."""
    peers = [record for record in _peers() if record["zipf"] == zipf]
    ours = [record for record in _ours() if record["zipf"] == zipf]
    sizes = sorted({record["keys"] for record in peers})
    head = ["width", "10^9 keys/s", *(f"{size:,} keys" for size in sizes)]
    if with_wall:
        head.append(f"{sizes[0]:,} keys, until known (us)")
    lines = []
    for width in sorted({record["width"] for record in ours}):
        mine = {r["keys"]: r for r in ours if r["width"] == width}
        for what, field in (("ceiling", "ceiling_us"), ("static cache", "whole_us"), ("dynamic cache", "told_us")):
            cells = [_digits(_rate(keys, mine[keys][field])) for keys in sizes]
            wall = f"{mine[sizes[0]]['wall_us']:.0f}" if with_wall and field == "told_us" else ""
            lines.append([str(width), what, *cells, wall][: len(head)])
        for peer in PEERS:
            theirs = {r["keys"]: r for r in peers if (r["peer"], r["width"]) == (peer, width)}
            if not theirs:
                continue
            about = theirs[sizes[0]]
            name = f"{peer.split()[0]} {about['version']}: {about['form']}"
            cells = [_digits(theirs[keys]["gkeys_per_s"]) for keys in sizes]
            wall = f"{about['wall_us']:.0f}" if with_wall else ""
            lines.append([str(width), name, *cells, wall][: len(head)])
    return note_tables.table(head, lines)


def rates() -> str:
    return _rates_table(0.0, with_wall=True)


def power_law_rates() -> str:
    return _rates_table(1.05, with_wall=False)


def keys() -> str:
    """Of docs/configuration.md, whose first table of these keys is that of models: key, type, default, description."""
    lines: dict[str, list[str]] = {}
    for line in (ROOT / "docs/configuration.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split(" | ")]
        if line.startswith("| `") and len(cells) >= 4:
            key = cells[0].removeprefix("| ")
            lines.setdefault(key, [key, cells[2], cells[3]])
    return note_tables.table(["key", "default", "what it does"], [lines[f"`{key}`"] for key in KEYS])


# ---- figures --------------------------------------------------------------------------------------------------------


def _text(x: float, y: float, content: str, anchor: str = "middle", size: int = 12, extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"{extra}>{escape(content)}</text>'


def _box(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}" stroke="#333"/>'


def _line(x1: float, y1: float, x2: float, y2: float, extra: str = 'stroke="#333"') -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {extra}/>'


def _document(width: int, height: int, parts: list[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" fill="#222">'
    )
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="#fff"/>', *parts, "</svg>"]) + "\n"


def _constants() -> dict[str, int]:
    """From cuda_kernels/cache_bucket.h: ways, bytes of a bucket, and the first bits of the word of state."""
    header = (ROOT / "cuda_kernels/cache_bucket.h").read_text(encoding="utf-8")

    def find(pattern: str) -> int:
        return int(re.search(pattern, header)[1])

    bits = r" = uint64_t\{1\} << (\d+);"
    return {
        "ways": find(r"kCacheWays = (\d+);"),
        "bytes": find(r"sizeof\(CacheBucket\) == (\d+)\)"),
        "holds": find(r"StateHolds\(int way\) \{ return uint64_t\{1\} << \((\d+) \+ way\)"),
        "overflowed": find("kStateOverflowed" + bits),
        "locked": find("kStateLocked" + bits),
        "version": find("kStateVersionOne" + bits),
    }


def layout() -> str:
    """One bucket, its word of state bit by bit, and where the rows of a bucket lie."""
    of = _constants()
    ways = of["ways"]
    left, right = 40, 900
    cell = (right - left) / (ways + 1)
    parts = [_text(left, 28, f"A bucket: {of['bytes']} bytes, one access of the memory", "start", 15)]
    for way in range(ways):
        parts += [_box(left + way * cell, 42, cell, 40, "#cfe3f5")]
        parts += [_text(left + (way + 0.5) * cell, 67, f"key {way}")]
    state = left + ways * cell
    parts += [_box(state, 42, cell, 40, "#fbe3c4"), _text(state + cell / 2, 67, "state")]

    begins = (0, of["holds"], of["overflowed"], of["locked"], of["version"], 64)
    names = ("marks of use, two bits a way", "holds a row", "overflowed", "locked", "version")
    fills = ("#fbe3c4", "#fdf1de", "#f3c6c0", "#f3c6c0", "#fbe3c4")
    # Single bits are drawn wider than they are, so that they can be seen.
    spans = [max(end - begin, 4) for begin, end in zip(begins, begins[1:], strict=False)]
    unit = (right - left) / sum(spans)
    parts += [_line(state, 82, left, 120, 'stroke="#bbb"'), _line(right, 82, right, 120, 'stroke="#bbb"')]
    x = float(left)
    for i, (name, fill, span) in enumerate(zip(names, fills, spans, strict=True)):
        first, last = begins[i], begins[i + 1] - 1
        parts += [_box(x, 120, span * unit, 34, fill)]
        bits = f"{first}..{last}" if last > first else str(first)
        parts += [_text(x + span * unit / 2, 141, bits, size=11)]
        low = i == 3  # its name would run into its neighbour's
        parts += [_text(x + span * unit / 2, 186 if low else 170, name, size=11)]
        x += span * unit

    parts += [_text(left, 228, "A table: an array of buckets and an array of rows", "start", 15)]
    parts += [_text(left, 262, "key", "start"), _line(left + 26, 258, left + 60, 258)]
    parts += [_text(left + 66, 262, "hash: high half of hash x buckets tells the bucket b", "start")]
    buckets, width = 8, (right - left) / 8
    chosen = 3
    for b in range(buckets):
        name = {chosen - 1: "b - 1", chosen: "bucket b", chosen + 1: "b + 1"}.get(b, "")
        fill = "#9cc7ea" if b == chosen else "#eaf2fa"
        parts += [_box(left + b * width, 282, width, 30, fill), _text(left + (b + 0.5) * width, 302, name, size=11)]
    middle = left + (chosen + 0.5) * width
    parts += [_line(left + 70, 268, middle, 282, 'stroke="#333" stroke-dasharray="4 3"')]
    row = (right - left) / (ways + 4)
    first = 2
    parts += [_line(left + chosen * width, 312, left + first * row, 350, 'stroke="#bbb"')]
    parts += [_line(left + (chosen + 1) * width, 312, left + (first + ways) * row, 350, 'stroke="#bbb"')]
    for i in range(ways + 4):
        way = i - first
        inside = 0 <= way < ways
        parts += [_box(left + i * row, 350, row, 34, "#c9e7d3" if inside else "#f2f8f4")]
        if inside:
            parts += [_text(left + (i + 0.5) * row, 371, f"{ways}b + {way}" if way else f"{ways}b", size=11)]
    parts += [_text(left, 406, "rows, row_bytes each: nothing has to be read between a bucket and its row", "start")]
    second = "Where b is marked as overflowed a key that is not there is looked for in its second bucket"
    parts += [_text(left, 426, second + " (tables placed as a whole).", "start")]
    return _document(right + left, 446, parts)


class _Rates:
    """A panel: rate over the size of the batch, both axes logarithmic."""

    WIDTH, HEIGHT = 280, 280

    def __init__(self, x: float, y: float, sizes: list[int], low: float, high: float):
        self.x0, self.y0, self.sizes, self.low, self.high = x, y, sizes, low, high

    def x(self, size: int) -> float:
        first, last = math.log2(self.sizes[0]), math.log2(self.sizes[-1])
        return self.x0 + (math.log2(size) - first) / (last - first) * self.WIDTH

    def y(self, rate: float) -> float:
        share = (math.log10(rate) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return self.y0 + (1 - share) * self.HEIGHT

    def frame(self, title: str) -> list[str]:
        parts = [_text(self.x0 + self.WIDTH / 2, self.y0 - 8, title, size=13, extra=' font-weight="bold"')]
        for rate in (0.01, 0.1, 1, 10):
            if self.low <= rate <= self.high:
                parts += [_line(self.x0, self.y(rate), self.x0 + self.WIDTH, self.y(rate), 'stroke="#ddd"')]
                parts += [_text(self.x0 - 6, self.y(rate) + 4, f"{rate:g}", "end", 11)]
        for size in self.sizes:
            name = f"{size >> 20} Mi" if size >= 1 << 20 else f"{size >> 10} Ki"
            parts += [_text(self.x(size), self.y0 + self.HEIGHT + 16, name, size=11)]
        parts += [f'<rect x="{self.x0}" y="{self.y0}" width="{self.WIDTH}" height="{self.HEIGHT}" fill="none" '
                  'stroke="#999"/>']  # fmt: skip
        return parts

    def series(self, points: dict[int, float], name: str) -> list[str]:
        colour, dash = COLOURS[name], ' stroke-dasharray="6 4"' if name == "ceiling" else ""
        path = " ".join(f"{self.x(size):.1f},{self.y(rate):.1f}" for size, rate in sorted(points.items()))
        parts = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>']
        if name != "ceiling":
            dots = [(self.x(size), self.y(rate)) for size, rate in points.items()]
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in dots]
        return parts


def _legend(labels: dict[str, str]) -> list[str]:
    """Below the panels, by the names of COLOURS."""
    parts, x = [], 50.0
    for name, label in labels.items():
        dash = ' stroke-dasharray="6 4"' if name == "ceiling" else ""
        parts += [_line(x, 392, x + 24, 392, f'stroke="{COLOURS[name]}" stroke-width="2"{dash}')]
        parts += [_text(x + 30, 396, label, "start", 11)]
        x += 48 + 6.2 * len(label)
    return parts


def rates_chart() -> str:
    """Keys a second, all of them resident: the ceiling of our run, ours, peers; a panel for each width of the rows."""
    ours, peers = _ours(), _peers()
    sizes = sorted({record["keys"] for record in ours})
    parts = [_text(530, 24, "All keys resident, uniform: 10^9 keys a second over the keys in a call", size=15)]
    for i, width in enumerate(sorted({record["width"] for record in ours})):
        panel = _Rates(50 + i * 350, 66, sizes, 0.01, 30)
        parts += panel.frame(f"rows of {width} float32 values")
        mine = [record for record in ours if record["width"] == width and not record["zipf"]]
        for name, field in (("ceiling", "ceiling_us"), ("dynamic", "told_us"), ("static", "whole_us")):
            parts += panel.series({r["keys"]: _rate(r["keys"], r[field]) for r in mine}, name)
        for peer in PEERS:
            theirs = [r for r in peers if (r["peer"], r["width"], r["zipf"]) == (peer, width, 0)]
            if theirs:
                parts += panel.series({r["keys"]: r["gkeys_per_s"] for r in theirs}, peer)
    names = {"ceiling": "ceiling of the run", "static": "our static cache", "dynamic": "our dynamic cache"}
    versions = {record["peer"]: record["version"] for record in peers}
    labels = {name: names.get(name, f"{name} {versions.get(name, '')}") for name in COLOURS}
    return _document(1060, 412, parts + _legend(labels))


def roofline_chart() -> str:
    """What hits move of the memory's bytes, under what bounds them: an empty kernel's time, and the memory's rate."""
    records = _ours()
    bounds = {r["width"]: r for r in _last_run("device_cache.jsonl", ("device_bounds",))[1]}
    sizes = sorted({record["keys"] for record in records})
    parts = [_text(530, 24, "All keys resident, uniform: 10^12 bytes a second over the keys in a call", size=15)]
    for i, (width, bound) in enumerate(sorted(bounds.items())):
        panel = _Rates(50 + i * 350, 66, sizes, 0.01, 10)
        parts += panel.frame(f"rows of {width} float32 values")
        bytes_of_key = 8 + _constants()["bytes"] + 2 * 4 * width
        memory = bound["copy_gb_per_s"] / 1000
        full = memory * 1e6 * bound["empty_us"] / bytes_of_key  # keys that a copy moves in an empty kernel's time
        roof = {size: min(memory, size * bytes_of_key / bound["empty_us"] / 1e6) for size in sizes}
        parts += panel.series({**roof, round(full): memory}, "ceiling")
        mine = [record for record in records if record["width"] == width and not record["zipf"]]
        for name, field in (("dynamic", "told_us"), ("static", "whole_us")):
            parts += panel.series({r["keys"]: r["keys"] * bytes_of_key / r[field] / 1e6 for r in mine}, name)
    names = {"ceiling": "bound: an empty kernel's time, then the rate of a copy (bytes read and written)"}
    names |= {"static": "our static cache", "dynamic": "our dynamic cache"}
    return _document(1060, 412, parts + _legend(names))


TABLES: dict[str, Callable[[], str]] = {
    "gpu_cache_runs": runs,
    "gpu_cache_rates": rates,
    "gpu_cache_power_law": power_law_rates,
    "gpu_cache_keys": keys,
}
FIGURES: dict[str, Callable[[], str]] = {
    "docs/gpu_cache_layout.svg": layout,
    "docs/gpu_cache_rates.svg": rates_chart,
    "docs/gpu_cache_roofline.svg": roofline_chart,
}

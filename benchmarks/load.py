"""How fast a folder goes into the hash map, and what memory that takes. Run as a module: the process that loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from .axes import Axes
from .workload import MODEL, load_keys, load_values, write_config, write_load_folder

CHECKED_ROWS = 10_000
LOAD_FACTOR = 0.8


def anonymous_bytes() -> int:
    """RssAnon of this process: memory of its own, without pages of files."""
    with open("/proc/self/status", encoding="ascii") as status:
        line = next(line for line in status if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class PeakSampler:
    """The highest RssAnon while it is entered."""

    def __enter__(self):
        self.peak_bytes = anonymous_bytes()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def _run(self) -> None:
        while not self._ended.wait(0.002):
            self.peak_bytes = max(self.peak_bytes, anonymous_bytes())

    def __exit__(self, *exc_info) -> None:
        self._ended.set()
        self._thread.join()
        self.peak_bytes = max(self.peak_bytes, anonymous_bytes())


def load_once(config: str, rows: int, width: int) -> dict:
    """Opens the server, checks rows, and says what it took."""
    import hierarchical_parameter_server as hps

    before = anonymous_bytes()
    with PeakSampler() as sampler:
        processor_start, start = time.process_time(), time.perf_counter()
        server = hps.ParameterServer(config)
        seconds, processor_seconds = time.perf_counter() - start, time.process_time() - processor_start
    loaded = anonymous_bytes()
    with server:
        stats = server.stats()["models"][0]["tables"][0]
        for first in {0, max(0, rows // 2 - CHECKED_ROWS), max(0, rows - CHECKED_ROWS)}:
            last = min(rows, first + CHECKED_ROWS)
            if not np.array_equal(server.lookup(load_keys(first, last), MODEL), load_values(first, last, width)):
                raise SystemExit(f"wrong rows among the rows {first} to {last}")
        if stats["volatile"]["rows"] != rows:
            raise SystemExit(f"{stats['volatile']['rows']} rows in the table, expected {rows}")
    return {
        "seconds": round(seconds, 3),
        "processor_seconds": round(processor_seconds, 3),
        "peak_bytes": sampler.peak_bytes - before,
        "loaded_bytes": loaded - before,
        "bytes_read": stats["load"]["bytes_read"],
    }


def measure_load(axes: Axes, folder: Path | None = None) -> dict:
    """The record of the load benchmark: the median of several processes, the highest of their peaks."""
    width = axes.load_width
    rows = axes.load_folder_bytes // (width * 4 + 8)
    runs = []
    with tempfile.TemporaryDirectory(prefix="hps_load_", dir=folder) as name:
        write_load_folder(Path(name) / "table", rows, width)
        config = write_config(Path(name) / "ps.json", Path(name) / "table", width)
        root = Path(__file__).absolute().parent.parent
        environment = {**os.environ, "HPS_TENSORFLOW": "off", "PYTHONPATH": str(root)}
        for _ in range(axes.load_repeats):
            command = [sys.executable, "-m", "benchmarks.load", str(config), str(rows), str(width)]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"the loading process failed with exit code {done.returncode}: {done.stdout}")
            runs.append(json.loads(done.stdout))
    seconds = float(np.median([run["seconds"] for run in runs]))
    planned_bytes = rows * (width * 4 + 16 / LOAD_FACTOR)
    peak_bytes = max(run["peak_bytes"] for run in runs)
    return {
        "kind": "load",
        "rows": rows,
        "width": width,
        "repeats": len(runs),
        "load_average": os.getloadavg()[0],
        "folder_bytes": runs[0]["bytes_read"],
        "seconds": seconds,
        "processor_seconds": float(np.median([run["processor_seconds"] for run in runs])),
        "rows_per_second": round(rows / seconds),
        "peak_bytes": peak_bytes,
        "loaded_bytes": max(run["loaded_bytes"] for run in runs),
        "planned_bytes": round(planned_bytes),
        "memory_ratio": round(peak_bytes / planned_bytes, 3),
        "goal_rows_per_second": axes.load_goal_rows_per_second,
        "goal_memory_ratio": axes.load_goal_memory_ratio,
    }


if __name__ == "__main__":
    print(json.dumps(load_once(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))

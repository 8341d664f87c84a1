"""Printing for people: sections, aligned facts, a progress bar, and TensorFlow without its start-up messages."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import Any


def quiet_tensorflow() -> Any:
    """Imports TensorFlow; what its native libraries say at start-up goes nowhere."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with _stderr_closed():
        import tensorflow as tf

        tf.zeros(())
    tf.get_logger().setLevel("ERROR")
    return tf


@contextlib.contextmanager
def _stderr_closed() -> Iterator[None]:
    sys.stderr.flush()
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def section(title: str) -> None:
    """Starts a section of the output."""
    print(f"\n{title}\n{'-' * len(title)}", flush=True)


def fact(name: str, value: str) -> None:
    """One aligned line."""
    print(f"  {name:<24} {value}", flush=True)


class ProgressBar:
    """A bar that redraws itself on a terminal; elsewhere one line at the end."""

    _CELLS = 30

    def __init__(self, name: str, total: int) -> None:
        self._name = name
        self._total = total
        self._start = time.perf_counter()
        self._drawn = 0.0

    def update(self, done: int, note: str = "") -> None:
        """Shows that `done` of the total is reached; `note` stands behind the bar."""
        now = time.perf_counter()
        finished = done >= self._total
        if not finished and (not sys.stdout.isatty() or now - self._drawn < 0.1):
            return
        self._drawn = now
        cells = self._CELLS * done // self._total
        bar = "#" * cells + "." * (self._CELLS - cells)
        seconds = now - self._start
        start = "\r" if sys.stdout.isatty() else ""
        end = "\n" if finished else ""
        print(
            f"{start}  {self._name:<24} {bar} {done:>9,} / {self._total:,}  {seconds:5.1f} s  {note}",
            end=end,
            flush=True,
        )

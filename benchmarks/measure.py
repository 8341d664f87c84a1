"""Measures one case: rows first, then times, the peers taking turns call by call."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path

import numpy as np

import hierarchical_parameter_server as hps

from .axes import Axes
from .workload import Case, TableData, draw_batches

TIERS = ("volatile", "persistent", "default")


class WrongRowsError(Exception):
    """A peer returned rows that are not the table's: there is no number for it."""


def check_rows(case: Case, axes: Axes, data: TableData, ids: np.ndarray, rows: dict[str, np.ndarray]) -> None:
    """Compares all peers bit by bit, and with numpy: exactly where rows are copied, to rounding where combined.

    Raises:
        WrongRowsError: naming the peer and the first row that differs.
    """
    expected = data.values[ids]
    exact = case.form == "dense"
    if not exact:
        expected = expected.reshape(case.batch, axes.ids_per_sample, -1).mean(axis=1, dtype=np.float64)
    reference = expected if exact else next(iter(rows.values()))
    for peer, actual in rows.items():
        if actual.shape != expected.shape or actual.dtype != np.float32:
            raise WrongRowsError(
                f"{case}: {peer} returned {actual.dtype} {actual.shape}, expected float32 {expected.shape}"
            )
        wrong = (actual.view(np.uint32) != reference.astype(np.float32).view(np.uint32)).any(axis=1)
        if not exact:
            wrong |= ~np.isclose(actual, expected, rtol=1e-5, atol=0).all(axis=1)
        if wrong.any():
            first = int(np.flatnonzero(wrong)[0])
            raise WrongRowsError(f"{case}: {peer} returned {int(wrong.sum())} wrong rows, the first is row {first}")


def rows_served() -> dict[str, dict[str, int]]:
    """Rows served so far per tier, for the configuration file of each server of this process."""
    return {server["config"]: server["models"][0]["tables"][0]["rows_served"] for server in hps.stats()["servers"]}


def take_turns(calls: list, axes: Axes) -> tuple[np.ndarray, np.ndarray]:
    """Times and processor times of the calls in seconds, both [peers, rounds].

    Args:
        calls: per peer (lookup, batches). All peers get the same batch in a round; who begins changes.
    """
    times, processor_times = [], []
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + axes.seconds_per_case
        while len(times) < axes.min_rounds or (len(times) < axes.max_rounds and time.perf_counter() < end):
            turn = len(times)
            taken, used = [0.0] * len(calls), [0.0] * len(calls)
            for i in range(len(calls)):
                peer = (i + turn) % len(calls)
                lookup, batches = calls[peer]
                batch = batches[turn % len(batches)]
                processor_start, start = time.process_time(), time.perf_counter()
                rows = lookup(batch)
                taken[peer] = time.perf_counter() - start
                used[peer] = time.process_time() - processor_start
                del rows
            times.append(taken)
            processor_times.append(used)
    finally:
        if collecting:
            gc.enable()
    return np.array(times).T, np.array(processor_times).T


def measure(case: Case, axes: Axes, data: TableData, peers: list) -> dict:
    """The record of one case.

    Raises:
        WrongRowsError: rows are checked before and after the times are taken.
    """
    ids = draw_batches(case, axes)
    calls, names = [], []
    for peer in peers:
        lookup = peer.lookup(case, axes)
        if lookup is not None:
            names.append(peer.name)
            calls.append((lookup, [peer.batch(case, axes, batch) for batch in ids]))

    def check(batch: int) -> None:
        rows = {name: np.asarray(lookup(batches[batch])) for name, (lookup, batches) in zip(names, calls, strict=True)}
        check_rows(case, axes, data, ids[batch], rows)

    check(0)
    before = rows_served()
    times, processor_times = take_turns(calls, axes)
    after = rows_served()
    check(-1)

    keys = case.ids_per_call(axes)
    record = {
        "kind": "lookup",
        "form": case.form,
        "distribution": case.distribution,
        "width": case.width,
        "batch": case.batch,
        "call": case.call,
        "rows": axes.rows,
        "keys": keys,
        "unique_share": round(float(np.mean([len(np.unique(batch)) for batch in ids[:4]])) / keys, 4),
        "rounds": times.shape[1],
        "load_average": os.getloadavg()[0],
        "peers": {},
    }
    native = times[names.index("tensorflow")]
    for name, taken, used in zip(names, times, processor_times, strict=True):
        median = float(np.median(taken))
        record["peers"][name] = {
            "median_us": round(median * 1e6, 2),
            "p99_us": round(float(np.quantile(taken, 0.99)) * 1e6, 2),
            # Of all threads; other programs on the machine do not lengthen it.
            "processor_us": round(float(np.median(used)) * 1e6, 2),
            "keys_per_second": round(keys / median),
            "ratio": round(float(np.median(native)) / median, 3),
            # How much the machine's noise moves the ratio: the middle half of the rounds.
            "ratio_quartiles": [round(float(q), 3) for q in np.quantile(native / taken, [0.25, 0.75])],
        }
    for peer in peers:
        if isinstance(config := getattr(peer, "config_path", None), Path):
            served = {tier: after[str(config)][tier] - before[str(config)][tier] for tier in TIERS}
            record["peers"][peer.name]["rows_from"] = served
    return record

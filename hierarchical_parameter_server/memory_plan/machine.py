"""What this machine has to spare: memory (control groups too), room on disk, GPUs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from .. import _native


def available_host_bytes() -> int | None:
    """The rule by which servers refuse loads that cannot fit (cc/core/host_memory.h)."""
    return _native.available_memory_bytes()


def free_disk_bytes(path: str) -> int | None:
    """On the file system of `path`, or of the nearest folder above it that exists."""
    for folder in (Path(path), *Path(path).absolute().parents):
        if folder.is_dir():
            return shutil.disk_usage(folder).free
    return None


def free_shared_memory_bytes(name: str) -> int | None:
    """In /dev/shm, where what the file of that name has already counts as free."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return None
    file = folder / name
    return shutil.disk_usage(folder).free + (file.stat().st_blocks * 512 if file.exists() else 0)


def gpu_free_bytes() -> dict[int, int]:
    """Free memory of each GPU by its number, as the driver tells; none without a driver."""
    command = ["nvidia-smi", "--query-gpu=index,memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        lines = [line.split(",") for line in done.stdout.splitlines()]
        return {int(index): int(mebibytes) << 20 for index, mebibytes in lines}
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}

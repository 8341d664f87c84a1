"""Finds what a build needs: in the running Python, in the environment to install into, or on the machine.

An isolated pip build cannot import the packages of the environment it installs into, but their folder is known.
Usage (CMake asks so): python tools/build_tools.py tensorflow|nvcc    prints a path, or an empty line
"""

import glob
import importlib.util
import os
import shutil
import sys
import sysconfig

TENSORFLOW_MINOR = "2.21"  # its C++ interface is stable within a minor version only


def _package_folders(name: str) -> list[str]:
    """Returns the folders that package `name` may be in, the importable one first."""
    folders = []
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # its parent is missing
        spec = None
    if spec and spec.submodule_search_locations:
        folders += spec.submodule_search_locations
    return [*folders, os.path.join(sysconfig.get_path("purelib"), *name.split("."))]


def find_tensorflow() -> str | None:
    """Returns the folder of the tensorflow package to build against, without importing it."""
    for folder in _package_folders("tensorflow"):
        metadata = os.path.join(os.path.dirname(folder), f"tensorflow*-{TENSORFLOW_MINOR}.*.dist-info")
        if os.path.exists(os.path.join(folder, "include", "tensorflow")) and glob.glob(metadata):
            return folder
    return None


def find_nvcc() -> str | None:
    """Returns a CUDA compiler: $CUDACXX, nvcc on PATH, the toolkit's usual folder, or that of the pip packages."""
    packaged = [os.path.join(folder, "bin", "nvcc") for folder in _package_folders("nvidia.cu13")]
    for path in (os.environ.get("CUDACXX"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc", *packaged):
        if path and os.access(path, os.X_OK):
            return path
    return None


def find_tool(name: str) -> str | None:
    """Returns the path of `cmake` or `ninja`: on PATH, or the pip package of that name."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


if __name__ == "__main__":
    print({"tensorflow": find_tensorflow, "nvcc": find_nvcc}[sys.argv[1]]() or "")

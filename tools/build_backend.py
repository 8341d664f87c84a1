"""The build backend: setuptools, which also asks for what the machine lacks: CMake, Ninja, TensorFlow, a CUDA compiler.

The ops need TensorFlow's headers and framework library; the small CPU package has the same ones. A CUDA compiler is
asked for with HPS_CUDA=on alone.
"""

import os

from build_tools import TENSORFLOW_MINOR, find_hiredis, find_nvcc, find_tensorflow, find_tool
from requirements import read_pyproject
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the other hooks, unchanged)


def _missing() -> list[str]:
    missing = []
    if not find_tool("cmake"):
        missing.append("cmake>=3.25")
    if not find_tool("ninja"):
        missing.append("ninja")
    if not find_tensorflow():
        missing.append(f"tensorflow-cpu=={TENSORFLOW_MINOR}.*; platform_machine == 'x86_64'")
        missing.append(f"tensorflow=={TENSORFLOW_MINOR}.*; platform_machine != 'x86_64'")
    if not find_hiredis():
        missing.append("pip")  # fetches hiredis; an isolated build may have none
    if os.environ.get("HPS_CUDA", "").lower() == "on" and not find_nvcc():
        missing += read_pyproject()["project"]["optional-dependencies"]["cuda"]
    return missing


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _missing()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _missing()

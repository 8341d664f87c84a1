"""Builds the native libraries with CMake and puts them into the package folder. All metadata is in pyproject.toml.

Environment variables
    HPS_BUILD_DIR    folder to build in and to keep; default: a temporary one
    HPS_CMAKE_ARGS   more arguments for the CMake configuration, such as "-DHPS_TESTS=ON"
    HPS_CUDA, HPS_CUDA_ARCHITECTURES   the options of CMakeLists.txt of these names
"""

import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = "hierarchical_parameter_server"

sys.path.insert(0, str(ROOT / "tools"))
from build_tools import find_tool  # noqa: E402


class CMakeBuild(build_ext):
    """Stands in for the compiler: configure, build, install the component `python` into the package folder."""

    def run(self) -> None:
        keep = os.environ.get("HPS_BUILD_DIR")
        if keep:
            self._build(ROOT / keep)
        else:
            with tempfile.TemporaryDirectory(prefix="hps-build-") as folder:
                self._build(Path(folder))

    def _build(self, folder: Path) -> None:
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        if not cmake or not ninja:
            sys.exit("error: cmake and ninja are needed to build: apt-get install cmake ninja-build")
        # Everything that may have moved since the last time is said again: the cache would keep the old place.
        definitions = {
            "CMAKE_MAKE_PROGRAM": ninja,
            "Python_EXECUTABLE": sys.executable,
            "Python_INCLUDE_DIR": sysconfig.get_path("include"),
            "HPS_CUDA": os.environ.get("HPS_CUDA") or "auto",
            "HPS_CUDA_ARCHITECTURES": os.environ.get("HPS_CUDA_ARCHITECTURES", ""),
        }
        configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"]
        configure += [f"-D{name}={value}" for name, value in definitions.items()]
        self._call(configure + shlex.split(os.environ.get("HPS_CMAKE_ARGS", "")))
        self._call([cmake, "--build", str(folder)])
        self._call([cmake, "--install", str(folder), "--component", "python", "--prefix", str(self._package_folder())])

    def _package_folder(self) -> Path:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        return ROOT / PACKAGE if in_place else Path(self.build_lib).resolve() / PACKAGE

    def _call(self, command: list[str]) -> None:
        print("+", shlex.join(command), flush=True)
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            sys.exit(f"error: the native build failed (exit code {error.returncode}); its messages stand above")

    def get_outputs(self) -> list[str]:
        return [str(path) for path in self._package_folder().glob("*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # an editable build writes straight into the source folder


# The extension has no sources of its own: it makes the wheel a platform wheel and the build run.
setup(ext_modules=[Extension(f"{PACKAGE}._hps", sources=[])], cmdclass={"build_ext": CMakeBuild})

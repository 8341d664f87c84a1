"""Finds what a build needs: in the running Python, in the environment to install into, or on the machine.

An isolated pip build cannot import the packages of the environment it installs into, but their folder is known.
Usage (CMake asks so), each prints a path, or an empty line:
    python tools/build_tools.py tensorflow|nvcc
    python tools/build_tools.py fetched_nvcc
    python tools/build_tools.py hiredis BUILD_FOLDER
"""

import glob
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile

TENSORFLOW_MINOR = "2.21"  # its C++ interface is stable within a minor version only
# The source package of the Python package carries the C library with TLS, in vendor/hiredis.
HIREDIS_VERSION = "3.5.0"
HIREDIS_SHA256 = "c227592cc56b7df247abe4755c26723965be68972be2149fa441ac33d82131ba"
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


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


def fetch_nvcc() -> str:
    """Returns what find_nvcc does; where the machine has none, the pip packages of the extra `cuda`, in .cache/cuda.

    find_nvcc does not look there: a compiler that was fetched for one check must not change what other builds make.
    """
    found = find_nvcc()
    if found:
        return found
    from requirements import read_pyproject

    pinned = read_pyproject()["project"]["optional-dependencies"]["cuda"]
    place = os.path.join(ROOT, ".cache", "cuda")
    nvcc, done = os.path.join(place, "nvidia", "cu13", "bin", "nvcc"), os.path.join(place, "pinned.txt")
    wanted = "\n".join(pinned) + "\n"
    if os.access(nvcc, os.X_OK) and os.path.exists(done):
        with open(done, encoding="ascii") as file:
            if file.read() == wanted:
                return nvcc
    print(f"fetching a CUDA compiler into {os.path.relpath(place)}", file=sys.stderr)
    shutil.rmtree(place, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    if subprocess.run([*command, "--target", place, *pinned], stdout=sys.stderr, check=False).returncode != 0:
        sys.exit("error: no CUDA compiler could be fetched; pip's messages stand above")
    if not os.access(nvcc, os.X_OK):
        sys.exit(f"error: the pip packages of the extra 'cuda' brought no compiler: there is no program {nvcc}")
    with open(done, "w", encoding="ascii") as file:
        file.write(wanted)
    return nvcc


def _hiredis_places(build_folder: str) -> list[str]:
    """Returns where the sources may be kept: for all builds of this source tree, or beside this build."""
    folders = (os.path.join(ROOT, ".cache"), build_folder)
    return [os.path.join(folder, f"hiredis-{HIREDIS_VERSION}") for folder in folders]


def find_hiredis(build_folder: str = "") -> str | None:
    """Returns a folder that has the C sources in its subfolder `hiredis`, if they have been fetched before."""
    return next((place for place in _hiredis_places(build_folder) if os.path.exists(f"{place}/hiredis/ssl.c")), None)


def fetch_hiredis(build_folder: str) -> str:
    """Returns what find_hiredis does, fetching the sources where they are missing."""
    found = find_hiredis(build_folder)
    if found:
        return found
    # Without the variables by which an isolated build hides the pip that runs it.
    hidden = ("PYTHONPATH", "PYTHONHOME", "PIP_REQUIRE_VIRTUALENV")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    with tempfile.TemporaryDirectory(prefix="hps-hiredis-") as folder:
        pinned = os.path.join(folder, "pinned.txt")
        with open(pinned, "w", encoding="ascii") as file:
            file.write(f"hiredis=={HIREDIS_VERSION} --hash=sha256:{HIREDIS_SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary", "hiredis", "--require-hashes", "-r", pinned, "-d", folder]
        for env in (environment, None):
            done = subprocess.run(command, env=env, stdout=sys.stderr, check=False)
            if done.returncode == 0:
                break
        else:
            sys.exit("error: the sources of hiredis could not be fetched; pip's messages stand above")
        (archive,) = glob.glob(os.path.join(folder, "hiredis-*.tar.gz"))
        with tarfile.open(archive) as tar:
            prefix = f"hiredis-{HIREDIS_VERSION}/vendor/"
            wanted = [member for member in tar.getmembers() if member.name.startswith(prefix) and member.isfile()]
            for member in wanted:
                member.name = member.name.removeprefix(prefix)
            unpacked = os.path.join(folder, "unpacked")
            tar.extractall(unpacked, members=wanted)  # checked by its hash above
        for place in _hiredis_places(build_folder):
            try:
                os.makedirs(os.path.dirname(place), exist_ok=True)
                # Appears as a whole: another build may look at the same time.
                half = tempfile.mkdtemp(prefix="hiredis-", dir=os.path.dirname(place))
                shutil.copytree(unpacked, half, dirs_exist_ok=True)
                os.chmod(half, 0o755)
                try:
                    os.rename(half, place)
                except OSError:
                    shutil.rmtree(half)
                    if not os.path.exists(f"{place}/hiredis/ssl.c"):
                        raise
                return place
            except OSError as error:
                problem = error
        sys.exit(f"error: the sources of hiredis could not be unpacked: {problem}")


def find_tool(name: str) -> str | None:
    """Returns the path of `cmake` or `ninja`: on PATH, or the pip package of that name."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


if __name__ == "__main__":
    finders = {"tensorflow": find_tensorflow, "nvcc": find_nvcc, "fetched_nvcc": fetch_nvcc, "hiredis": fetch_hiredis}
    print(finders[sys.argv[1]](*sys.argv[2:]) or "")

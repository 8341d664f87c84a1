"""What the build refuses, and the developer scripts: summary of tests, file sizes, paths in pages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import build_tools  # noqa: E402
import check_paths  # noqa: E402
import check_sizes  # noqa: E402
import requirements  # noqa: E402
import test_summary as summary  # noqa: E402


def configure(folder: Path, *options: str) -> str:
    """Configures a core-only build that must fail, and returns what CMake says, on one line."""
    command = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    command += ["-DHPS_TENSORFLOW=OFF", "-DHPS_PYTHON=OFF", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    return " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("-DHPS_CUDA=maybe", "HPS_CUDA is 'maybe'; use auto, on or off"),
        ("-DHPS_CUDA=on -DCMAKE_CUDA_COMPILER=/bin/false", "'/bin/false --version' does not work"),
        ("-DHPS_SANITIZE=memory", "HPS_SANITIZE is 'memory'; use address, thread or nothing"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, option: str, message: str) -> None:
    assert message in configure(tmp_path, *option.split())


@pytest.mark.skipif(build_tools.find_nvcc() is not None, reason="this machine has a CUDA compiler")
def test_cuda_on_without_a_compiler_says_what_to_install(tmp_path: Path) -> None:
    message = configure(tmp_path, "-DHPS_CUDA=on")
    assert "there is no CUDA compiler" in message and "extra 'cuda' in pyproject.toml" in message


def test_tensorflow_of_another_version_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "tensorflow"
    (package / "include" / "tensorflow").mkdir(parents=True)
    monkeypatch.setattr(build_tools, "_package_folders", lambda name: [str(package)])
    assert build_tools.find_tensorflow() is None
    (tmp_path / "tensorflow-2.20.1.dist-info").mkdir()
    assert build_tools.find_tensorflow() is None
    (tmp_path / "tensorflow_cpu-2.21.0.dist-info").mkdir()
    assert build_tools.find_tensorflow() == str(package)


def test_cuda_compiler_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {}
    for name in ("chosen", "bin", "packaged/bin"):
        paths[name] = tmp_path / name / "nvcc"
        paths[name].parent.mkdir(parents=True)
        paths[name].write_text("#!/bin/sh\n")
        paths[name].chmod(0o755)
    monkeypatch.setattr(build_tools, "_package_folders", lambda name: [str(tmp_path / "packaged")])
    monkeypatch.setenv("CUDACXX", str(paths["chosen"]))
    monkeypatch.setenv("PATH", str(paths["bin"].parent), prepend=os.pathsep)
    assert build_tools.find_nvcc() == str(paths["chosen"])
    monkeypatch.delenv("CUDACXX")
    assert build_tools.find_nvcc() == str(paths["bin"])


def test_a_fetched_cuda_compiler_is_for_those_who_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = tmp_path / ".cache/cuda/nvidia/cu13/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    pip: list[list[str]] = []

    def run(command: list[str], **_kwargs: object) -> subprocess.CompletedProcess:
        pip.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(build_tools, "ROOT", str(tmp_path))
    monkeypatch.setattr(build_tools, "find_nvcc", lambda: None)
    monkeypatch.setattr(build_tools.subprocess, "run", run)
    pins = requirements.read_pyproject()["project"]["optional-dependencies"]["cuda"]
    (tmp_path / ".cache/cuda/pinned.txt").write_text("\n".join(pins) + "\n")
    assert build_tools.fetch_nvcc() == str(nvcc) and not pip
    # Other versions, or half of them: all anew, and pip's failure is an error.
    (tmp_path / ".cache/cuda/pinned.txt").write_text("nvidia-cuda-nvcc==12.0\n")
    with pytest.raises(SystemExit, match="no CUDA compiler could be fetched"):
        build_tools.fetch_nvcc()
    assert pip[0][-len(pins) :] == pins and not nvcc.exists()
    monkeypatch.setattr(build_tools, "find_nvcc", lambda: "/machine/nvcc")
    assert build_tools.fetch_nvcc() == "/machine/nvcc"


SUITE = '<testsuites><testsuite tests="5" failures="{failures}" errors="0" skipped="1"/></testsuites>'


@pytest.mark.parametrize(
    ("text", "line", "exit_code"),
    [
        (SUITE.format(failures=0), "4 passed, 0 failed, 1 skipped", 0),
        (SUITE.format(failures=1), "3 passed, 1 failed, 1 skipped", 1),
        ('<testsuite tests="0"/>', "0 passed, 0 failed, 0 skipped", 1),
        (None, "0 passed, 1 failed, 0 skipped", 1),  # the runner died and wrote nothing
    ],
)
def test_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, line: str, exit_code: int
) -> None:
    path = tmp_path / "result.xml"
    if text:
        path.write_text(text)
    assert summary.main([f"all={path}"]) == exit_code
    assert capsys.readouterr().out.splitlines()[-1] == line


def test_long_files_are_found(tmp_path: Path) -> None:
    short, long = tmp_path / "short.py", tmp_path / "long.py"
    short.write_text("x\n" * check_sizes.LIMIT)
    long.write_text("x\n" * (check_sizes.LIMIT + 1))
    (problem,) = check_sizes.too_long([str(short), str(long)])
    assert "long.py:1: 801 lines" in problem


def test_dead_paths_in_pages_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_paths, "ROOT", tmp_path)
    (tmp_path / "cc").mkdir()
    page = tmp_path / "page.md"
    page.write_text("`cc/` and `cc/gone.h`\n[page](page.md) and [other](other.md#part), [web](https://example.org)\n")
    assert [problem.split(": ")[1] for problem in check_paths.missing(page)] == [
        "there is no cc/gone.h",
        "there is no other.md",
    ]


@pytest.mark.parametrize(("arguments", "exit_code"), [(["help"], 0), ([], 0), (["nonsense"], 1)])
def test_dev_lists_its_commands(arguments: list[str], exit_code: int) -> None:
    done = subprocess.run([ROOT / "dev", *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == exit_code
    assert "usage: ./dev COMMAND" in done.stdout + done.stderr

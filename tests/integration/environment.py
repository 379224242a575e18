"""What the integration tests need beyond `make venv`: programs from apt, vLLM in its own place."""

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = Path(__file__).with_name("vllm-requirements.txt")
POLICY = Path("/usr/sbin/policy-rc.d")
"""Asked by Debian's packages whether they may start their services."""
INSTALL_SECONDS = 420
# The torch that vLLM for CPUs pins is not on PyPI; asked for where pip's own settings lack it.
TORCH_FOR_CPUS = ("--extra-index-url", "https://download.pytorch.org/whl/cpu")
# vLLM imports them where they are there, and they demand a torch of their own.
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
ON_CPU = ("--dtype", "float32", "--enforce-eager", "--attention-backend", "CPU_MLA")
"""Flags of vLLM with which it computes as transformers does."""
SERVING = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
}


def apt_install(*programs: tuple[str, str]) -> None:
    """Installs the package of each (program, package) that is not there; skips where it can't.

    A program may be a shared library. Services that come with a package are not started.
    """
    missing = [package for program, package in programs if not _is_there(program)]
    if not missing:
        return
    if os.geteuid() != 0:
        pytest.skip(f"needs {', '.join(missing)}; installing them takes root")
    if not shutil.which("apt-get"):
        pytest.skip(f"needs {', '.join(missing)}, and there is no apt-get")
    install = ["apt-get", "install", "--yes", "--no-install-recommends", *missing]
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    with _no_services():
        for command in (install, ["apt-get", "update"], install):
            done = run_within(INSTALL_SECONDS, command, env=environment)
            if done.returncode == 0 and command is install:
                return
    pytest.skip(f"apt-get cannot install {', '.join(missing)}: {done.stderr[-300:]}")


def _is_there(program: str) -> bool:
    if ".so." not in program:
        return shutil.which(program) is not None
    try:
        ctypes.CDLL(program)
    except OSError:
        return False
    return True


@contextmanager
def _no_services() -> Iterator[None]:
    """Tells Debian's packages to start nothing, unless somebody has told them something already."""
    if POLICY.exists():
        yield
        return
    POLICY.write_text("#!/bin/sh\nexit 101\n")
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink(missing_ok=True)


def run_within(seconds: float, command: Sequence[str], **options) -> subprocess.CompletedProcess:
    """Runs a command and keeps its output; what takes longer is ended with all its children."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, start_new_session=True, **(pipes | options))
    try:
        out, error = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, error = process.communicate()
        error = f"{error or ''}\nended, as it was not done in {seconds:g} s"
    except BaseException:  # the tests themselves are being ended
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, error)


@functools.cache
def vllm_python() -> str:
    """Python of an environment with vLLM for CPUs, made once for each set of requirements."""
    apt_install(("libnuma.so.1", "libnuma1"), ("lscpu", "util-linux"))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron-dsv3"
    key = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:16]
    directory = cache / f"vllm-{key}"
    python, complete = directory / "bin" / "python", directory / "complete"
    with _locked(cache / "vllm.lock"):
        if not complete.exists():
            shutil.rmtree(directory, ignore_errors=True)
            pip = [str(python), "-m", "pip"]
            install = [*pip, "install", "--quiet", "-r", str(REQUIREMENTS)]
            _first_that_works(*([python, "-m", "venv", str(directory)] for python in _pythons()))
            _first_that_works(install, [*install, "--retries=0", *TORCH_FOR_CPUS])
            _first_that_works([*pip, "uninstall", "--quiet", "--yes", *UNWANTED])
            _name_it_vllm(directory)
            complete.touch()
    os.utime(directory)  # CI deletes what was not used for a week
    return str(python)


def _pythons() -> list[str]:
    """Those that may run vLLM, the one that most of its wheels are for first."""
    # Not by PATH alone: shims of version managers are there, and may not run.
    managed = sorted(map(str, Path.home().glob(".pyenv/versions/3.11*/bin/python")))
    return ["/usr/bin/python3.11", *managed, "python3.11", sys.executable]


def _name_it_vllm(directory: Path) -> None:
    """vLLM asks for the metadata of `vllm`; the build for CPUs has another name."""
    probe = "import importlib.metadata; print(importlib.metadata.version('vllm-cpu'))"
    version = subprocess.check_output([directory / "bin/python", "-c", probe], text=True).strip()
    [packages] = (directory / "lib").glob("python*/site-packages")
    metadata = packages / f"vllm-{version}+cpu.dist-info"
    metadata.mkdir()
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
    (metadata / "METADATA").write_text(text)


def _first_that_works(*commands: Sequence[str]) -> None:
    for command in commands:
        try:
            done = run_within(INSTALL_SECONDS, command)
        except FileNotFoundError:
            continue
        if done.returncode == 0:
            return
    pytest.skip(f"vLLM cannot be installed here: {done.stderr[-500:]}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def started(command: Sequence[str], **options) -> Iterator[subprocess.Popen[str]]:
    """A process that writes to one pipe; at the end SIGTERM, by which it ends its own children."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
    process = subprocess.Popen(command, text=True, **pipes, **options)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.communicate(timeout=90)
            except subprocess.TimeoutExpired:
                process.kill()


def read_until(process: subprocess.Popen[str], text: str, seconds: float) -> list[str]:
    """What a process prints up to the line with `text`; one that takes longer gets SIGTERM."""
    timer = threading.Timer(seconds, process.terminate)
    timer.start()
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            break
    timer.cancel()
    return lines


def free_port() -> int:
    """A port of this machine where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command_lines(*words: str) -> list[str]:
    """Of the processes that have all these words among their arguments."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = path.read_text().split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if set(words) <= set(arguments):
            found.append(" ".join(arguments))
    return found


def stand_in_ssh(folder: Path) -> str:
    """PATH with an ssh that runs here what it is told to run elsewhere, without the terminal."""
    folder.mkdir()
    script = folder / "ssh"
    # As ssh does: the words joined, for a shell, which outlives a connection that breaks.
    script.write_text(
        '#!/bin/sh\n[ "$1 $2" = "-o BatchMode=yes" ] || exit 255\nshift 3\n'
        'exec setsid --wait sh -c "$*"\n'
    )
    script.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"

"""What the integration tests need beyond `make venv`: programs from apt, vLLM in its own place."""

import fcntl
import functools
import hashlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = Path(__file__).with_name("vllm-requirements.txt")
VLLM_PYTHON = "3.11"
# vLLM imports them where they are there, and they demand a torch of their own.
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
SERVING = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
}


def apt_install(*programs: tuple[str, str]) -> None:
    """Installs the package of each (program, package) that is not there; skips where it can't."""
    missing = [package for program, package in programs if not shutil.which(program)]
    if not missing:
        return
    if os.geteuid() != 0:
        pytest.skip(f"needs {', '.join(missing)}; installing them takes root")
    if not shutil.which("apt-get"):
        pytest.skip(f"needs {', '.join(missing)}, and there is no apt-get")
    install = ["apt-get", "install", "--yes", "--no-install-recommends", *missing]
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (install, ["apt-get", "update"], install):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode == 0 and command is install:
            return
    pytest.skip(f"apt-get cannot install {', '.join(missing)}: {done.stderr[-300:]}")


@functools.cache
def vllm_python() -> str:
    """Python of an environment with vLLM for CPUs, made once for each set of requirements."""
    interpreter = _find_python()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron-dsv3"
    key = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:16]
    directory = cache / f"vllm-{key}"
    python, complete = directory / "bin" / "python", directory / "complete"
    with _locked(cache / "vllm.lock"):
        if not complete.exists():
            shutil.rmtree(directory, ignore_errors=True)
            _run([interpreter, "-m", "venv", str(directory)])
            _run([str(python), "-m", "pip", "install", "--quiet", "-r", str(REQUIREMENTS)])
            _run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *UNWANTED])
            _name_it_vllm(directory)
            complete.touch()
    return str(python)


def _find_python() -> str:
    """A Python of vLLM's version that runs: shims of version managers may not."""
    names = [f"python{VLLM_PYTHON}"]
    names += sorted(map(str, Path.home().glob(f".pyenv/versions/{VLLM_PYTHON}*/bin/python")))
    for name in names:
        probe = [name, "-c", "import venv, ssl"]
        try:
            if subprocess.run(probe, capture_output=True, check=False).returncode == 0:
                return name
        except FileNotFoundError:
            continue
    pytest.skip(f"needs Python {VLLM_PYTHON}, for which vLLM is built for CPUs")


def _name_it_vllm(directory: Path) -> None:
    """vLLM asks for the metadata of `vllm`; the build for CPUs has another name."""
    probe = "import importlib.metadata; print(importlib.metadata.version('vllm-cpu'))"
    version = subprocess.check_output([directory / "bin/python", "-c", probe], text=True).strip()
    [packages] = (directory / "lib").glob("python*/site-packages")
    metadata = packages / f"vllm-{version}+cpu.dist-info"
    metadata.mkdir()
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
    (metadata / "METADATA").write_text(text)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    if done.returncode:
        pytest.skip(f"vLLM cannot be installed here: {done.stderr[-500:]}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def free_port() -> int:
    """A port of this machine where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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

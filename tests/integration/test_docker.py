"""Both images, built by a real Docker engine on stand-ins for their bases.

A stand-in carries the real one's name and, like it, Python 3.12 and torch: Debian with the test
environment copied in; in vLLM's place is a server that answers as it does. It says nothing about
NVIDIA's or vLLM's image, GPUs, NCCL or Transformer Engine.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from environment import ROOT, apt_install, run_within

HERE = Path(__file__).parent
DEBIAN = "bookworm"
# What Python's standard library and torch link to.
LIBRARIES = (
    *("ca-certificates", "libssl3", "libffi8", "zlib1g", "libbz2-1.0", "liblzma5", "libgomp1"),
    *("libsqlite3-0", "libstdc++6", "libuuid1", "libexpat1", "libreadline8", "git"),
)
PACKAGES = f"/usr/local/lib/python3.{sys.version_info.minor}/site-packages"
# The stand-in has no cache of libraries, for which its own ldconfig would have to run.
LOADER = ("--change", "ENV LD_LIBRARY_PATH=/usr/local/lib")
TESTS = ("test_architecture", "test_mapping", "test_fp8", "test_job", "test_chat", "test_local")
TRAINING_ONLY = ("megatron", "xxhash", "matplotlib", "tensorboard", "pyarrow")
"""Packages that vLLM's environment does not bring."""
BUILD_SECONDS, RUN_SECONDS = 300, 120
READY_SECONDS = 60
Docker = Callable[..., subprocess.CompletedProcess]


def _base(dockerfile: str = "Dockerfile") -> str:
    [name] = re.findall(r"^ARG BASE_IMAGE=(\S+)$", _dockerfile(dockerfile), re.MULTILINE)
    return name


def _dockerfile(name: str) -> str:
    return (ROOT / "docker" / name).read_text()


@pytest.fixture(scope="module")
def docker(tmp_path_factory) -> Iterator[Docker]:
    """Runs `docker` against an engine of our own, which ends with the tests."""
    apt_install(("dockerd", "docker.io"), ("iptables", "iptables"), ("mmdebstrap", "mmdebstrap"))
    # Not in pytest's folder: it keeps those of three runs, and this one takes 15 GB.
    root = tmp_path_factory.mktemp("docker")
    # The client that belongs to the engine; another one first in PATH may want plug-ins.
    client = shutil.which("docker", path=f"/usr/bin:{os.environ['PATH']}")
    environment = os.environ | {"DOCKER_HOST": f"unix://{root}/docker.sock", "DOCKER_BUILDKIT": "1"}

    def run(*arguments: str, **options) -> subprocess.CompletedProcess:
        seconds = BUILD_SECONDS if arguments[0] in ("build", "import") else RUN_SECONDS
        return run_within(seconds, [client, *arguments], env=environment, **options)

    script = str(HERE / "docker.sh")
    try:
        up = run_within(60, ["bash", script, "up", str(root)])
        if up.returncode:
            pytest.skip(f"no Docker engine can run here: {up.stderr[-500:]}")
        yield run
    finally:
        run_within(90, ["bash", script, "down", str(root)])
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="module")
def debian(docker, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("debian") / "debian.tar"
    command = ["mmdebstrap", "--variant=minbase", f"--include={','.join(LIBRARIES)}", DEBIAN]
    done = run_within(BUILD_SECONDS, [*command, str(path)])
    if done.returncode:
        pytest.skip(f"no Debian can be had: {done.stderr[-500:]}")
    return path


@pytest.fixture(scope="module")
def image(docker, debian, tmp_path_factory) -> str:
    """The training image's name."""
    producer = [sys.executable, str(HERE / "stand_in_base.py"), str(debian)]
    with subprocess.Popen(producer, stdout=subprocess.PIPE) as tar:
        imported = docker("import", *LOADER, "-", _base(), stdin=tar.stdout)
        if imported.returncode:
            tar.kill()  # nobody reads what it writes
    assert imported.returncode == tar.returncode == 0, imported.stderr
    pip_conf = tmp_path_factory.mktemp("pip") / "pip.conf"
    pip_conf.write_text(_pip_settings())
    built = _build(docker, "megatron-dsv3", "--secret", f"id=pip.conf,src={pip_conf}")
    assert built.returncode == 0, built.stderr[-5000:]
    return "megatron-dsv3"


@pytest.fixture(scope="module")
def serving_image(docker, image, tmp_path_factory) -> str:
    """The serving image's name; in its base a stand-in answers in vLLM's place."""
    context = tmp_path_factory.mktemp("vllm")
    package = context / "vllm" / "entrypoints" / "cli"
    package.mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "fake_vllm.py", package / "fake.py")
    for folder in (package, *package.parents[:2]):
        (folder / "__init__.py").touch()
    (package / "main.py").write_text(
        "import sys\nfrom vllm.entrypoints.cli import fake\n"
        'sys.argv[1:1] = ["-m", "vllm.entrypoints.cli.main"]\nfake.main()\n'
    )
    lacking = " ".join(f"{PACKAGES}/{package}*" for package in TRAINING_ONLY)
    base = f"FROM {_base()}\nCOPY vllm {PACKAGES}/vllm\nRUN rm -rf {lacking}\n"
    (context / "Dockerfile").write_text(base)
    tag = ("--network", "host", "--tag", _base("Dockerfile.serve"))
    made = docker("build", *tag, str(context))
    assert made.returncode == 0, made.stderr
    built = _build(docker, "megatron-dsv3-serve", dockerfile="Dockerfile.serve")
    assert built.returncode == 0, built.stderr[-5000:]
    return "megatron-dsv3-serve"


def _build(
    docker: Docker, name: str, *options: str, dockerfile: str = "Dockerfile"
) -> subprocess.CompletedProcess:
    command = ["build", "--progress=plain", "--network", "host", "--tag", name]
    command += ["--file", str(ROOT / "docker" / dockerfile), *options]
    return docker(*command, str(ROOT))


def _pip_settings() -> str:
    """How pip reaches packages on this machine, its certificates among it, as a pip.conf."""
    # `pip config get` asks one file; the list merges all, and the environment's come last.
    command = [sys.executable, "-m", "pip", "config", "list"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    values = {}
    for line in done.stdout.splitlines():
        name, value = line.split("=", maxsplit=1)
        values[name.rpartition(".")[2]] = ast.literal_eval(value)
    lines = ["[global]"]
    for key in ("index-url", "extra-index-url", "trusted-host", "cert"):
        if key in values and not values[key].startswith("file:"):
            lines.append(f"{key} = {values[key]}")
    return "\n".join(lines) + "\n"


def _run(docker: Docker, image: str, *command: str, options: tuple[str, ...] = ()):
    return docker("run", "--rm", "--network", "none", *options, image, *command)


def test_a_base_without_torch_is_refused_and_told(docker, image, tmp_path):
    bare = f"FROM {_base()}\nRUN rm -rf {PACKAGES}/torch*\n"
    (tmp_path / "Dockerfile").write_text(bare)
    made = docker("build", "--network", "host", "--tag", "bare", str(tmp_path))
    assert made.returncode == 0, made.stderr
    built = _build(docker, "none", "--build-arg", "BASE_IMAGE=bare")
    assert built.returncode != 0
    assert "the base has no torch, expected 2.11; this Dockerfile installs none" in built.stderr


def test_the_command_line_runs_as_another_user_than_root(docker, image):
    done = _run(docker, image, "megatron-dsv3", "--help")
    assert done.returncode == 0, done.stderr
    assert "Fine-tune DeepSeek-V3" in done.stdout
    assert _run(docker, image, "id", "-un").stdout == "dsv3\n"
    assert _run(docker, image, "id", "-u").stdout == "10001\n"


def test_without_a_command_the_container_tells_what_it_brings(docker, image):
    done = _run(docker, image)
    assert done.returncode == 0, done.stderr
    # Docker's own /dev/shm is too small, and that is said.
    for what in ("torch", "2.11.0", "megatron-core", "0.19.2", "GPUs", "start a container with"):
        assert what in " ".join(done.stderr.split()), done.stderr


def test_versions_are_those_of_the_constraints(docker, image):
    done = _run(docker, image, "python3", "-m", "pip", "list", "--format=freeze")
    installed = dict(line.split("==") for line in done.stdout.splitlines() if "==" in line)
    pinned = re.findall(r"^(megatron-core|transformers|xxhash|safetensors)==(\S+)$",
                        (ROOT / "constraints.txt").read_text(), re.MULTILINE)  # fmt: skip
    assert len(pinned) == 4
    assert {name: installed[name] for name, _ in pinned} == dict(pinned)


def test_the_packages_tests_pass_inside(docker, image):
    mounts = []
    for name in ("tests", "pyproject.toml"):
        mounts += ["--volume", f"{ROOT / name}:/work/{name}:ro"]
    files = [f"tests/{name}.py" for name in TESTS]
    options = (*mounts, "--workdir", "/work", "--env", "PYTHONDONTWRITEBYTECODE=1")
    pytest_ = ("python3", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore")
    done = _run(docker, image, *pytest_, *files, options=options)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    # The installed package, not a checkout.
    where = _run(
        docker, image, "python3", "-c", "import megatron_dsv3; print(megatron_dsv3.__file__)"
    )
    assert where.stdout.startswith("/usr/local/lib/python3"), where.stdout


def test_the_image_holds_neither_sources_to_build_from_nor_an_index(docker, image):
    done = _run(docker, image, "ls", "-A", "/opt/megatron_dsv3")
    assert sorted(done.stdout.split()) == sorted(
        ("LICENSE", "README.md", "constraints.txt", "docker", "examples", "setup.py", "tools")
    )
    environment = _run(docker, image, "env").stdout
    assert not [line for line in environment.splitlines() if line.startswith("PIP_INDEX")]
    assert not _run(docker, image, "cat", "/etc/pip.conf").stdout


def test_the_serving_image_runs_as_another_user_and_ends_when_stopped(
    docker, serving_image, models
):
    models.chmod(0o755)  # pytest's folders are their owner's alone
    options = ("--volume", f"{models}:/models:ro")
    checked = _run(docker, serving_image, "check", "/models/fp32", options=options)
    assert checked.returncode == 0, checked.stderr
    assert "/models/fp32: servable" in checked.stdout
    serve = ["run", "/models/fp32", "--fake-load-seconds", "1"]
    started = docker("run", "--detach", "--network", "none", *options, serving_image, *serve)
    assert started.returncode == 0, started.stderr
    container = started.stdout.strip()
    end = time.monotonic() + READY_SECONDS
    while "curl " not in (said := docker("logs", container).stdout):
        state = docker("inspect", "--format", "{{.State.Running}}", container).stdout.strip()
        assert state == "true", said[-3000:] + docker("logs", container).stderr[-3000:]
        assert time.monotonic() < end, said[-3000:]
        time.sleep(0.5)
    assert docker("exec", container, "id", "-un").stdout == "dsv3\n"
    asked = docker("exec", container, "megatron-dsv3", "serve", "smoke", "http://127.0.0.1:8000")
    assert "answer: " in asked.stdout, asked.stdout + asked.stderr
    docker("stop", "--time", "60", container)
    ended = docker("inspect", "--format", "{{.State.ExitCode}}", container).stdout
    assert ended == "0\n", docker("logs", container).stderr[-2000:]
    assert "SIGTERM: ending the server" in docker("logs", container).stdout
    docker("rm", container)

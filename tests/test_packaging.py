"""What setup.py declares is what the code imports; constraints.txt pins it; the scripts find it."""

import ast
import functools
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
# Imports of what CPU environments don't have, so that no installed metadata can tell.
NOT_INSTALLED_HERE = {
    "transformer_engine": "transformer-engine",
    "transformer_engine_torch": "transformer-engine",
    "vllm": "vllm",
}
FOLDERS = ("megatron_dsv3", "tools", "examples", "benchmarks", "scripts", "tests")
OURS = set(FOLDERS)


@pytest.fixture(scope="module")
def metadata(tmp_path_factory) -> importlib.metadata.Distribution:
    """What setup.py declares by setuptools' account, rather than by a reading of the file."""
    folder = tmp_path_factory.mktemp("egg")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", folder],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    return importlib.metadata.Distribution.at(folder / "megatron_dsv3.egg-info")


def declared(metadata: importlib.metadata.Distribution, *extras: str) -> dict[str, Requirement]:
    requirements = map(Requirement, metadata.requires)
    return {
        canonicalize_name(r.name): r
        for r in requirements
        if r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in extras)
    }


# Imports against declarations


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_import_is_declared(metadata, folder):
    extras = ("gpu", "serve") if folder == "megatron_dsv3" else ("gpu", "serve", "bench", "dev")
    missing = undeclared(ROOT / folder, set(declared(metadata, *extras)))
    assert not missing, "\n".join(missing)


def test_an_undeclared_import_is_found(tmp_path):
    (tmp_path / "a.py").write_text("import os, yaml\nfrom transformer_engine.pytorch import x\n")
    assert undeclared(tmp_path, {"pyyaml", "transformer-engine"}) == []
    assert undeclared(tmp_path, {"transformer-engine"}) == [
        "a.py imports yaml (pyyaml), undeclared"
    ]
    (tmp_path / "a.py").write_text("def f():\n    import apex\n")
    assert undeclared(tmp_path, {"pyyaml"}) == ["a.py imports apex (apex), undeclared"]


def test_the_script_that_makes_the_environment_needs_nothing_installed():
    of_others = undeclared(ROOT / "scripts", set())
    assert [line for line in of_others if line.startswith("make_venv.py")] == []
    assert top_level_imports(ROOT / "scripts" / "make_venv.py") >= {"venv"}


def undeclared(folder: Path, names: set[str]) -> list[str]:
    """Lines about imports of what neither this project, nor Python, nor any of `names` brings."""
    local = OURS | {name for path in folder.rglob("*.py") for name in (path.stem, path.parent.name)}
    wrong = []
    for path in sorted(folder.rglob("*.py")):
        for module in sorted(top_level_imports(path) - local - sys.stdlib_module_names):
            owners = distributions_of(module)
            if not owners & names:
                found = f"{path.relative_to(folder)} imports {module} ({', '.join(sorted(owners))})"
                wrong.append(f"{found}, undeclared")
    return wrong


def top_level_imports(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text(), str(path))))
    plain = {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    source = {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.level == 0}
    return {name.split(".")[0] for name in plain | source}


def distributions_of(module: str) -> set[str]:
    owners = packages_distributions().get(module)
    return set(map(canonicalize_name, owners or [NOT_INSTALLED_HERE.get(module, module)]))


@functools.cache
def packages_distributions() -> dict[str, list[str]]:
    return dict(importlib.metadata.packages_distributions())


def test_pypi_apex_is_never_declared(metadata):
    everything = declared(metadata, "gpu", "serve", "dev")
    assert {"torch", "transformer-engine", "vllm", "pytest"} <= set(everything)
    assert "apex" not in everything
    assert "apex" not in pins()


def test_every_dependency_has_a_lower_and_an_upper_bound(metadata):
    for name, requirement in declared(metadata, "gpu", "serve", "dev").items():
        operators = {specifier.operator for specifier in requirement.specifier}
        if name != "packaging":  # versions by calendar: no bound would mean anything
            assert operators == {">=", "<"}, f"{requirement}: expected >= and <"


# Exact versions


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all([s.operator for s in r.specifier] == ["=="] for r in requirements)
    return {canonicalize_name(r.name): next(iter(r.specifier)).version for r in requirements}


def test_every_dependency_is_pinned_within_its_range(metadata):
    pinned = pins()
    for name, requirement in declared(metadata, "dev").items():
        assert name in pinned, f"{name}: declared in setup.py, not pinned in constraints.txt"
        assert requirement.specifier.contains(pinned[name]), f"{requirement}, pinned {pinned[name]}"


def test_whatever_an_installation_brings_is_pinned(metadata):
    brought = closure(declared(metadata, "dev").values())
    assert len(brought) > 50
    assert not (loose := sorted(brought - set(pins()))), f"not pinned in constraints.txt: {loose}"


def closure(requirements: Iterable[Requirement]) -> set[str]:
    """Names of what these bring on this platform, as the installed metadata tells."""
    seen: dict[str, set[str]] = {}
    left = list(requirements)
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        extras = {"", *requirement.extras}
        if extras <= seen.setdefault(name, set()):
            continue
        seen[name] |= extras
        needs = map(Requirement, importlib.metadata.requires(name) or [])
        left += [n for n in needs if n.marker is None or any_extra(n, extras)]
    return set(seen)


def any_extra(requirement: Requirement, extras: set[str]) -> bool:
    return any(requirement.marker.evaluate({"extra": extra}) for extra in extras)


# What is shipped


def test_the_console_script_names_a_function_that_is_there(metadata):
    (script,) = metadata.entry_points.select(group="console_scripts")
    assert (script.name, script.value) == ("megatron-dsv3", "megatron_dsv3.cli:main")
    tree = ast.parse((ROOT / f"{script.module.replace('.', '/')}.py").read_text())
    assert script.attr in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_file_of_the_package_is_shipped(metadata):
    shipped = set(metadata.read_text("SOURCES.txt").splitlines())
    files = {str(path.relative_to(ROOT)) for path in package_files()}
    assert "megatron_dsv3/__init__.py" in files
    assert not (lost := sorted(files - shipped)), f"no __init__.py, or not in package_data: {lost}"


def package_files() -> Iterator[Path]:
    for path in (ROOT / "megatron_dsv3").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            yield path


# Finding a Python


def find_python(*folders: Path, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, folders))
    return subprocess.run(
        ["/bin/bash", ROOT / "scripts/find_python.sh"],
        env={"PATH": path, "HOME": str(home)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def fake_python(folder: Path, name: str, script: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)
    return path


WORKS = f'exec "{sys.executable}" "$@"'
SHIM = "echo 'pyenv: python3.12: command not found' >&2; exit 127"
OLD = "echo 'is 3.11.7, expected 3.12 to 3.14' >&2; exit 1"


@pytest.mark.parametrize(
    "fakes",
    [
        {"a/python3.12": SHIM, "a/python3.13": WORKS},
        {"a/python3.12": SHIM, "b/python3.12": WORKS},
        {"a/python3.12": SHIM, "a/python3": OLD, "home/.pyenv/versions/3.12.1/bin/python": WORKS},
        {"a/python3": WORKS},
    ],
    ids=["shim before a newer one", "shim before another place", "only pyenv's", "only python3"],
)
def test_a_python_that_runs_is_found_behind_one_that_does_not(tmp_path, fakes):
    for name, script in fakes.items():
        fake_python(tmp_path, name, script)
    found = find_python(tmp_path / "a", tmp_path / "b", home=tmp_path / "home")
    assert found.returncode == 0, found.stderr
    # The interpreter behind the environment that the tests run in, never the environment's own.
    assert found.stdout.strip() == sys._base_executable


def test_without_a_python_all_that_was_tried_is_listed_with_the_ways_to_get_one(tmp_path):
    fake_python(tmp_path, "a/python3.12", SHIM)
    fake_python(tmp_path, "a/python3", OLD)
    found = find_python(tmp_path / "a", home=tmp_path)
    assert found.returncode == 2
    assert found.stdout == ""
    for expected in (
        "a/python3.12: pyenv: python3.12: command not found",
        "a/python3: is 3.11.7",
        "apt install python3.12",
        "pyenv install",
        "conda create",
        "uv python install",
        "make PYTHON=",
    ):
        assert expected in found.stderr
    assert "nothing: no python3" in find_python(tmp_path / "none", home=tmp_path).stderr


def test_a_python_named_by_the_user_is_the_only_one_tried(tmp_path):
    fake_python(tmp_path, "a/python3.12", WORKS)
    old = str(fake_python(tmp_path, "b/python", OLD))
    found = find_python(tmp_path / "a", home=tmp_path, PYTHON=old)
    assert found.returncode == 2
    assert f"{old}: is 3.11.7" in found.stderr
    assert "a/python3.12" not in found.stderr


# Making the environment


@pytest.fixture
def make_venv(monkeypatch) -> ModuleType:
    """scripts/make_venv.py with the slow parts, venv and pip, noted in `calls` rather than done."""
    spec = importlib.util.spec_from_file_location("make_venv", ROOT / "scripts/make_venv.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.calls = []

    def create(folder: Path) -> None:
        module.calls.append("create")
        fake_python(folder, "bin/python", "exit 0")

    monkeypatch.setattr(module.venv, "EnvBuilder", lambda **_: type("Fake", (), {"create": create}))
    monkeypatch.setattr(module, "pip_install", lambda folder, *args: module.calls.append(args[-1]))
    monkeypatch.setattr(module, "NEEDED_GB", 0)
    return module


BUILT = ["create", ".[dev]"]


def test_an_environment_is_made_once_and_kept(make_venv, tmp_path):
    make_venv.ensure(tmp_path / "venv")
    make_venv.ensure(tmp_path / "venv")
    assert make_venv.calls == BUILT


@pytest.mark.parametrize("name", ["setup.py", "constraints.txt"])
def test_changed_requirements_make_it_anew(make_venv, tmp_path, monkeypatch, name):
    for file in make_venv.REQUIREMENTS:
        (tmp_path / file).write_text("old")
    monkeypatch.setattr(make_venv, "ROOT", tmp_path)
    make_venv.ensure(tmp_path / "venv")
    (tmp_path / "venv/left-over").write_text("")
    (tmp_path / name).write_text("new")
    make_venv.ensure(tmp_path / "venv")
    assert make_venv.calls == BUILT * 2
    assert not (tmp_path / "venv/left-over").exists()


def test_an_interrupted_installation_is_made_anew(make_venv, tmp_path, monkeypatch):
    def killed(folder: Path, *arguments: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(make_venv, "pip_install", killed)
        with pytest.raises(KeyboardInterrupt):
            make_venv.ensure(tmp_path / "venv")
    make_venv.ensure(tmp_path / "venv")
    assert make_venv.calls == ["create", *BUILT]


def test_an_environment_whose_python_is_gone_is_made_anew(make_venv, tmp_path):
    make_venv.ensure(tmp_path / "venv")
    (tmp_path / "venv/bin/python").unlink()
    make_venv.ensure(tmp_path / "venv")
    assert make_venv.calls == BUILT * 2


def test_a_moved_environment_is_made_anew_as_its_scripts_hold_its_path(make_venv, tmp_path):
    make_venv.ensure(tmp_path / "venv")
    (tmp_path / "venv").rename(tmp_path / "moved")
    make_venv.ensure(tmp_path / "moved")
    assert make_venv.calls == BUILT * 2


def test_only_the_link_is_set_anew_where_the_checkout_is_gone(make_venv, tmp_path):
    folder = tmp_path / "venv"
    make_venv.ensure(folder)
    key, checkout = make_venv.read_stamp(folder)
    assert checkout == str(ROOT)
    (folder / make_venv.STAMP).write_text(f"{key}\n{tmp_path}/gone\n")
    make_venv.ensure(folder)
    make_venv.ensure(folder)
    assert make_venv.calls == [*BUILT, "."]


def test_a_folder_that_is_not_ours_stays_as_it_is(make_venv, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="something else, which stays as it is"):
        make_venv.ensure(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert make_venv.calls == []


def test_too_little_disk_space_is_said_before_anything_is_installed(
    make_venv, tmp_path, monkeypatch
):
    monkeypatch.setattr(make_venv, "NEEDED_GB", 1_000_000)
    with pytest.raises(ValueError, match="expected 1000000 GB of free disk space, got"):
        make_venv.ensure(tmp_path / "venv")
    assert make_venv.calls == []

"""The wheel and the sdist, installed outside the checkout: what a user of `pip install` gets."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Built with what is installed, so that no network is asked.
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
ALONE = ("--no-deps", "--no-build-isolation")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """From a copy of what git knows: a build in the checkout would leave its products there."""
    folder = tmp_path_factory.mktemp("sdist")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    ).stdout
    for name in filter(None, listed.decode().split("\0")):
        copy = folder / "source" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((ROOT / name).read_bytes())
        copy.chmod((ROOT / name).stat().st_mode)
    call(sys.executable, "setup.py", "-q", "sdist", "-d", folder, cwd=folder / "source")
    [archive] = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def installed(sdist, tmp_path_factory) -> Path:
    """Directory for PYTHONPATH: the wheel that is built from the sdist, installed."""
    folder = tmp_path_factory.mktemp("installed")
    call(*PIP, "wheel", *ALONE, "-w", folder, sdist)
    [wheel] = folder.glob("megatron_dsv3-0.1.0-*.whl")
    call(*PIP, "install", *ALONE, "--target", folder / "site", wheel)
    return folder / "site"


def call(*command: object, cwd: Path | None = None, path: Path | None = None) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_sdist_holds_what_a_source_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "README_zh.md", "CHANGELOG.md", "constraints.txt"} <= names
    assert {"examples/quickstart.sh", "tools/checkpoint/convert.py", "docs/settings.md"} <= names
    assert not [name for name in names if name.endswith(".pyc")]


def test_the_command_works_outside_the_checkout(installed, tmp_path):
    where = "import megatron_dsv3.cli; print(megatron_dsv3.cli.__file__)"
    assert call(sys.executable, "-c", where, cwd=tmp_path, path=installed).startswith(
        str(installed)
    )
    command = installed / "bin" / "megatron-dsv3"
    assert "prepare" in call(command, "--help", cwd=tmp_path, path=installed)


def test_no_file_of_the_package_is_left_behind(installed):
    names = call("git", "ls-files", "megatron_dsv3", cwd=ROOT).split()
    assert len(names) > 100
    assert not [name for name in names if not (installed / name).is_file()]


def test_examples_and_the_converter_come_with_it(installed, tmp_path):
    out = tmp_path / "mine"
    command = installed / "bin" / "megatron-dsv3"
    listed = call(command, "examples", "--out", out, cwd=tmp_path, path=installed).splitlines()
    written = {Path(line).relative_to(out).as_posix() for line in listed}
    folders = ["examples", "tools"]
    known = call("git", "ls-files", *folders, cwd=ROOT).split()
    assert set(known) <= written
    for name in known:
        assert (out / name).read_bytes() == (ROOT / name).read_bytes(), name
    tool = out / "tools" / "checkpoint" / "convert.py"
    assert "--max-memory" in call(sys.executable, tool, "--help", cwd=tmp_path, path=installed)


def test_a_checkout_gives_the_same(tmp_path):
    command = ("-m", "megatron_dsv3.cli", "examples", "--out", tmp_path / "mine")
    listed = call(sys.executable, *command, cwd=tmp_path, path=ROOT).splitlines()
    known = call("git", "ls-files", "examples", "tools", cwd=ROOT).split()
    assert set(known) <= {Path(p).relative_to(tmp_path / "mine").as_posix() for p in listed}


def test_what_is_there_stays(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    command = [sys.executable, "-m", "megatron_dsv3.cli", "examples", "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "not an empty directory; give another --out" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]

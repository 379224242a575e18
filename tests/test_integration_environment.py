"""What keeps `make test-integration` from hanging and from failing where it cannot run."""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

PATH = Path(__file__).with_name("integration") / "environment.py"
NOT_THERE = ("no-such-program", "its-package")


@pytest.fixture
def environment(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("environment", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "POLICY", tmp_path / "policy-rc.d")
    return module


@pytest.fixture
def apt_get(tmp_path, monkeypatch):
    """Puts an apt-get of this text, or none, where programs are looked for."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def write(text: str) -> Path:
        (tmp_path / "apt-get").write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "apt-get").chmod(0o755)
        return tmp_path

    return write


def test_without_root_a_test_is_skipped_and_says_what_it_needs(environment, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(pytest.skip.Exception, match="needs its-package; installing"):
        environment.apt_install(NOT_THERE, ("sh", "dash"))


def test_without_apt_a_test_is_skipped(environment, monkeypatch, apt_get):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(pytest.skip.Exception, match="needs its-package, and there is no apt-get"):
        environment.apt_install(NOT_THERE)


def test_where_apt_fails_a_test_is_skipped_with_its_reason(environment, monkeypatch, apt_get):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    apt_get('echo "E: no network" >&2; exit 100')
    with pytest.raises(pytest.skip.Exception, match="cannot install its-package: E: no network"):
        environment.apt_install(NOT_THERE)


def test_a_list_of_packages_that_is_old_is_fetched_anew(environment, monkeypatch, apt_get):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    folder = apt_get(
        'echo "$@" >>"$0.log"; "${0%/*}/policy-rc.d"; echo $? >>"$0.policy"\n'
        '[ "$1" = update ] && echo >"$0.new"; [ -e "$0.new" ]'
    )
    environment.apt_install(NOT_THERE)
    assert (folder / "apt-get.policy").read_text().split() == ["101"] * 3, "no service is started"
    assert not (folder / "policy-rc.d").exists()
    install = "install --yes --no-install-recommends its-package"
    assert (folder / "apt-get.log").read_text().splitlines() == [install, "update", install]


def test_what_is_there_is_not_installed(environment, monkeypatch):
    ran = []
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(environment, "run_within", lambda *_, **__: ran.append("apt-get"))
    environment.apt_install(("sh", "dash"), ("libc.so.6", "libc6"))
    assert ran == []
    assert not environment.POLICY.exists()


def test_a_command_that_takes_too_long_is_ended_with_its_children(environment, tmp_path):
    file = tmp_path / "pid"
    start = time.monotonic()
    # The child holds the pipe, too: reading it to its end would take as long as the child lives.
    done = environment.run_within(1, ["sh", "-c", f"sleep 60 & echo $! >{file}; wait"])
    assert time.monotonic() - start < 20
    assert done.returncode != 0
    assert "not done in 1 s" in done.stderr
    child = Path(f"/proc/{file.read_text().strip()}/stat")
    while time.monotonic() - start < 20 and _lives(child):  # the kernel ends it in its own time
        time.sleep(0.05)
    assert not _lives(child)


def _lives(stat: Path) -> bool:
    try:
        return ") Z " not in stat.read_text()
    except OSError:  # gone, or going
        return False


def test_a_process_that_says_nothing_is_told_to_end(environment):
    command = [sys.executable, "-c", "print('a', flush=True); import time; time.sleep(60)"]
    start = time.monotonic()
    with environment.started(command) as process:
        assert environment.read_until(process, "b", seconds=1) == ["a\n"]
    assert time.monotonic() - start < 20
    assert isinstance(process, subprocess.Popen)
    assert process.returncode != 0

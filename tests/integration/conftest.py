"""The model that all integration tests serve, and marks for all of them."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from environment import ROOT, run_within

# Where apt puts daemons; not on the PATH of everyone who may start them.
os.environ["PATH"] = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
HERE = Path(__file__).parent
MODEL_SECONDS = 300


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("integration")


@pytest.fixture(scope="session", autouse=True)
def _ends_what_it_started() -> Iterator[None]:
    """Ended from outside, pytest would leave servers and daemons behind: fixtures end them."""
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.exit("SIGTERM", returncode=143))
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """fp32/, bf16/, fp8/ and their references of `trained_model.py`."""
    directory = tmp_path_factory.mktemp("models")
    paths = [str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-W", "ignore", str(HERE / "trained_model.py"), str(directory)]
    done = run_within(MODEL_SECONDS, command, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return directory

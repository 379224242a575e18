"""What is said of this machine, against what the system itself says."""

import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from rich.console import Console

from megatron_dsv3.commands import preflight
from megatron_dsv3.launch import local
from megatron_dsv3.launch.local import Fact, local_facts

Usage = namedtuple("Usage", "total used free")


def _facts(*directories: Path) -> dict[str, Fact]:
    return {fact.what: fact for fact in local_facts(directories)}


def test_versions_are_those_that_run():
    facts = _facts()
    assert facts["torch"].value.split("+")[0] == torch.__version__.split("+")[0]
    assert facts["megatron-core"].value == "0.19.2"
    assert facts["deep_ep"].value == "not installed"


def test_memory_is_what_the_kernel_says():
    free, total = (float(w) for w in _facts()["memory"].value.split() if w[0].isdigit())
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    gib = {words[0]: int(words[1]) / 2**20 for words in lines}
    assert total == pytest.approx(gib["MemTotal:"], abs=0.06)
    assert free == pytest.approx(gib["MemAvailable:"], abs=1.0)


def test_a_small_shared_memory_is_warned_of(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 26, 0, 1 << 26))
    assert "start a container with --ipc=host" in str(_facts()["/dev/shm"].warning)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 36, 0, 1 << 36))
    assert _facts()["/dev/shm"].warning is None


def test_a_directory_that_cannot_be_written_is_warned_of(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    assert _facts(tmp_path)[str(tmp_path)].warning == "this user cannot write there"
    assert _facts(tmp_path)[str(Path.cwd())].warning is None


def test_busy_devices_are_warned_of(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H100")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: ((79 - 40 * i) << 30, 80 << 30))
    facts = _facts()
    assert facts["GPUs"].value == "2"
    assert facts["GPU 0"] == Fact("GPU 0", "H100, 79.0 of 80.0 GiB free")
    assert "something else uses it" in str(facts["GPU 1"].warning)


def test_all_of_it_is_shown(capsys):
    preflight.run_local(Console(width=200))
    shown = capsys.readouterr().out
    assert not [fact.what for fact in local_facts() if fact.what not in shown]


def test_no_accelerator_is_told(monkeypatch):
    monkeypatch.setattr(local.torch.cuda, "is_available", lambda: False)
    assert _facts()["GPUs"].value == "none"

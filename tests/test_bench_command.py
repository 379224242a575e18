"""The bench command: which cases it takes, what it writes, what it says without a GPU."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from test_bench import CASE

from megatron_dsv3.commands import bench as command
from megatron_dsv3.commands.bench import (
    CASES,
    Request,
    Results,
    case_runs,
    choose,
    draw,
    limit_memory,
    measure,
)


def _fails(_groups, _steps):
    raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 TiB")


def test_cases_are_measured_and_one_that_fails_costs_none_of_the_others(groups):
    told: list[str] = []
    runs = {"too large": _fails, **case_runs([CASE])}
    results = measure(runs, {}, groups, 2, told.append)
    assert [got.name for got in results.measured] == ["tiny"]
    assert results.measured[0].tokens_per_second > 0
    assert results.failed == {"too large": "CUDA out of memory."}
    assert told[0].split() == ["too", "large", "failed:", "CUDA", "out", "of", "memory."]
    assert told[1].startswith("tiny ")
    assert torch.__version__.startswith(results.about["torch"])
    json.dumps(asdict(results))


def test_names_are_chosen_by_patterns_in_their_own_order():
    names = dict.fromkeys(["bf16 1x4k", "bf16 4x4k", "fp8 4x4k"])
    assert choose(names, ()) == list(names)
    assert choose(names, ["fp8*", "bf16 4*"]) == ["bf16 4x4k", "fp8 4x4k"]
    with pytest.raises(ValueError, match=r"no case is called 'fp4\*'; there are: bf16 1x4k, "):
        choose(names, ["bf16*", "fp4*"])


def test_every_case_has_a_name_of_its_own():
    assert len({case.name for case in CASES}) == len(CASES)


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no GPU is visible"):
        command.run(Request(json=tmp_path / "new" / "file.json"), Console())
    assert not list(tmp_path.iterdir())


def test_a_large_card_can_be_made_a_small_one(monkeypatch):
    gpu, given = torch.device("cuda", 0), []
    card = SimpleNamespace(total_memory=140 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda *arguments: given.append(arguments)
    )
    limit_memory(79.6, gpu)
    assert given == [(pytest.approx(79.6 / 140), gpu)]
    with pytest.raises(ValueError, match=r"--limit-gib 141 exceeds the 140.0 GiB of this GPU"):
        limit_memory(141, gpu)


@pytest.mark.parametrize("profiles", [{}, {"tiny": {"attention": 2.0, "norms": 1.0}}], ids=str)
def test_the_picture_is_drawn(groups, tmp_path, profiles):
    measured = measure(case_runs([CASE]), {}, groups, 1, print)
    path = tmp_path / "bench.png"
    draw(Results(measured.about, measured.measured, {}, profiles), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5000

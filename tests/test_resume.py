"""Which changes of a job leave it the same training, and which do not."""

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_engine import make_job

from megatron_dsv3.commands.resume import FREE, Identity, _settings
from megatron_dsv3.config.architecture import DEEPSEEK_V3

HF_DIR = Path("/models/tiny")
COUNTS = {"samples": 6, "tokens": 150, "counted_tokens": 84}


def _identity(**sections) -> Identity:
    return Identity(make_job(HF_DIR, **sections), DEEPSEEK_V3, "abc", COUNTS)


def test_the_same_run_has_no_differences():
    assert _identity().differences(_identity().state()) == []


@pytest.mark.parametrize(
    "sections",
    [
        {"parallel": {"tp_size": 2, "ep_size": 4}},
        {"memory": {"recompute": "full"}},
        {"train": {"micro_batch_size": 2, "hang_timeout_s": None}},
        {"checkpoint": {"every_steps": 7}},
        {"model": {"hf_dir": "/elsewhere"}, "data": {"paths": ["moved.jsonl"]}},
        {"experts": {"dispatcher": "allgather"}},
        {"optimizer": {"overlap_grad_reduce": True}},
    ],
)
def test_what_moves_no_number_may_change(sections):
    assert _identity(**sections).differences(_identity().state()) == []


@pytest.mark.parametrize(
    ("sections", "difference"),
    [
        ({"optimizer": {"lr": 2e-3}}, "optimizer.lr was 0.001, is 0.002"),
        ({"train": {"global_batch_size": 8}}, "train.global_batch_size was 4, is 8"),
        ({"train": {"seed": 5}}, "train.seed was 1234, is 5"),
        ({"schedule": {"decay": "linear"}}, "schedule.decay was 'cosine', is 'linear'"),
        ({"precision": {"compute": "bf16"}}, "precision.compute was 'fp32', is 'bf16'"),
    ],
)
def test_what_moves_numbers_is_named(sections, difference):
    assert _identity(**sections).differences(_identity().state()) == [difference]


def test_model_tokenizer_and_data_are_compared_by_content():
    other = Identity(
        make_job(HF_DIR), replace(DEEPSEEK_V3, num_layers=60), "abd", {**COUNTS, "tokens": 151}
    )
    assert other.differences(_identity().state()) == [
        "data: tokens was 150, is 151",
        "the model's architecture is another",
        "the model's tokenizer is another",
    ]


def test_a_setting_that_one_version_lacks_is_no_difference():
    state = _identity().state()
    state["job"] = state["job"].replace("  seed: 1234\n", "")
    assert "seed" not in state["job"]
    assert _identity().differences(state) == []


def test_every_free_setting_exists():
    names = _settings(_identity().state_of_job())
    for free in FREE:
        assert free in names or any(name.startswith(f"{free}.") for name in names), free


def test_the_state_says_with_which_versions_it_was_made():
    assert _identity().state()["versions"]["megatron-core"].startswith("0.19")

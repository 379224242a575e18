"""Sizes of parallelism: what divides, what is said where not, and which layer lives where."""

import re
from dataclasses import replace

import pytest
from pydantic import ValidationError

from megatron_dsv3.config.architecture import DEEPSEEK_V3
from megatron_dsv3.config.parallel import Parallel


@pytest.mark.parametrize(
    ("parallel", "world_size", "dp_size", "edp_size"),
    [
        (Parallel(), 1, 1, 1),
        (Parallel(), 8, 8, 8),
        (Parallel(tp_size=2, cp_size=2), 8, 2, 8),
        (Parallel(ep_size=8), 8, 8, 1),
        (Parallel(tp_size=8, pp_size=8, ep_size=32), 1024, 16, 4),
        (Parallel(tp_size=2, pp_size=2, ep_size=2, etp_size=2, cp_size=2), 16, 2, 2),
    ],
)
def test_what_the_sizes_leave_of_the_world_are_copies(parallel, world_size, dp_size, edp_size):
    assert parallel.dp_size(world_size) == dp_size
    assert parallel.edp_size(world_size) == edp_size
    assert parallel.problems(DEEPSEEK_V3, world_size) == []


def test_a_world_that_does_not_divide_is_refused_with_all_factors():
    parallel = Parallel(tp_size=2, cp_size=2)
    message = (
        r"^world size 6 is not tp_size\(2\) \* pp_size\(1\) \* cp_size\(2\) \* dp; "
        r"start a multiple of 4 processes or change a size$"
    )
    with pytest.raises(ValueError, match=message):
        parallel.dp_size(6)
    experts = Parallel(ep_size=4, etp_size=2, pp_size=2)
    with pytest.raises(
        ValueError, match=r"size 24 is not etp_size\(2\) \* ep_size\(4\) \* pp_size\(2\) \* edp; "
    ):
        experts.edp_size(24)


def test_sequence_parallelism_comes_with_tensor_parallelism():
    assert not Parallel().sequence_parallel
    assert Parallel(tp_size=2).sequence_parallel


PROBLEMS = {
    "heads": ({"tp_size": 4}, {"num_heads": 6}, r"^num_attention_heads 6 .* tp_size\(4\); .* 3$"),
    "ffn": ({"tp_size": 4}, {"ffn_hidden_size": 6}, r"^intermediate_size 6 .* tp_size\(4\); .* 3$"),
    "shared expert": (
        {"tp_size": 4},
        {"moe_ffn_hidden_size": 6, "num_shared_experts": 3},
        r"moe_intermediate_size \* n_shared_experts 18 is not divisible by tp_size\(4\)",
    ),
    "vocabulary": (
        {"tp_size": 4},
        {"vocab_size": 129281},
        r"vocab_size 129281 .* tp_size\(4\); .* is 1, or pad .* to 129284 rows",
    ),
    "experts": ({"ep_size": 3}, {}, r"n_routed_experts 256 is not divisible by ep_size\(3\)"),
    "expert ffn": (
        {"etp_size": 4},
        {"moe_ffn_hidden_size": 6},
        r"^moe_intermediate_size 6 is not divisible by etp_size\(4\); .* fits is 3$",
    ),
    "stages": (
        {"pp_size": 8, "vpp_size": 8},
        {},
        r"pp_size\(8\) \* vpp_size\(8\) = 64 chunks, but the model has 61 layers",
    ),
    "chunks without stages": ({"vpp_size": 2}, {}, r"vpp_size\(2\) needs pp_size > 1"),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_each_size_that_does_not_fit_the_model_is_named(case):
    sizes, changes, message = PROBLEMS[case]
    parallel, arch = Parallel(**sizes), replace(DEEPSEEK_V3, **changes)
    world_size = 3 * 2**10  # divisible by all of these sizes
    [problem] = parallel.problems(arch, world_size)
    assert re.search(message, problem)


def test_all_problems_are_reported_at_once():
    parallel = Parallel(tp_size=3, ep_size=5, pp_size=64)
    problems = parallel.problems(DEEPSEEK_V3, 8)
    starts = ["world size 8 is not tp", "world size 8 is not etp", "num_attention_heads 128"]
    starts += ["moe_intermediate_size * n_shared_experts 2048", "vocab_size 129280"]
    starts += ["n_routed_experts 256", "pp_size(64) * vpp_size(1)"]
    assert [p.startswith(s) for p, s in zip(problems, starts, strict=True)] == [True] * 7


@pytest.mark.parametrize(
    ("sizes", "world_size", "message"),
    [
        ({}, 8, r"^num_optimizer_instances 3 must divide both dp\(8\) \* cp\(1\) = 8 and edp\(8\); "
         r"use one of 1, 2, 4, 8$"),
        ({"cp_size": 3, "ep_size": 3}, 6, r"dp\(2\) \* cp\(3\) = 6 and edp\(2\); use one of 1, 2$"),
        ({"tp_size": 3, "etp_size": 1}, 3, r"dp\(1\) \* cp\(1\) = 1 and edp\(3\); use one of 1$"),
    ],
)  # fmt: skip
def test_optimizer_instances_divide_the_copies_of_every_weight(sizes, world_size, message):
    parallel = Parallel(num_optimizer_instances=3, **sizes)
    problems = [p for p in parallel.problems(DEEPSEEK_V3, world_size) if "instances" in p]
    assert len(problems) == 1
    assert re.search(message, problems[0])
    both = Parallel(num_optimizer_instances=2, cp_size=2, ep_size=2)
    assert both.problems(DEEPSEEK_V3, 4) == []


def test_the_published_layouts_fit_v3():
    assert Parallel(tp_size=2, pp_size=8, ep_size=32).problems(DEEPSEEK_V3, 256) == []
    assert Parallel(pp_size=16, ep_size=64).problems(DEEPSEEK_V3, 2048) == []
    chunked = Parallel(tp_size=8, pp_size=8, vpp_size=4, ep_size=32)
    assert chunked.problems(DEEPSEEK_V3, 1024) == []


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True, None])
def test_a_size_is_a_positive_integer(value):
    with pytest.raises(ValidationError, match="tp_size"):
        Parallel(tp_size=value)


def test_the_record_is_frozen_and_knows_its_fields():
    with pytest.raises(ValidationError, match="frozen"):
        Parallel().tp_size = 2
    with pytest.raises(ValidationError, match="Extra inputs"):
        Parallel(tensor_parallel=2)


def test_every_size_has_a_description():
    assert all(info.description for info in Parallel.model_fields.values())

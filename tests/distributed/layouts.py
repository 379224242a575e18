"""Layouts by name, and how near their numbers must come to those of one process.

Compared per parameter: a wrong reduction of one norm leaves the loss as it was and moves the
gradient norm by less than 1e-4.
"""

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from distributed.launch import Results
from distributed.worker import Case
from torch import Tensor

LOSS_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-4
UPDATE_TOLERANCE = 1e-3

Tensors = Mapping[str, Tensor]

ONE = Case("one process")
FULL, SELECTIVE = {"recompute": "full"}, {"recompute": "selective"}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
ALLGATHER = {"dispatcher": "allgather"}
EXCHANGE = {"overlap_all_to_all": True}


def case(name: str, *, micro_batch_size: int = 1, **changes: Any) -> Case:
    """A layout by its name: `TP2 EP2`; sizes that are not named are 1, DP is what is left.

    A micro-batch of several samples is one row of packed documents.
    """
    sizes = dict(re.findall(r"\b(TP|PP|VPP|EP|ETP|CP)(\d+)", name))
    parallel = {f"{key.lower()}_size": int(value) for key, value in sizes.items()}
    parallel |= changes.pop("parallel", {})
    return Case(name, parallel, micro_batch_size=micro_batch_size, **changes)


def check(results: Results, case: Case, reference: Case, before: Tensors) -> None:
    """`before`: the weights that both began with."""
    ours, theirs = results.outcome(case.name), results.outcome(reference.name)
    assert ours.losses == pytest.approx(theirs.losses, rel=LOSS_TOLERANCE)
    assert ours.mtp_losses == pytest.approx(theirs.mtp_losses, rel=LOSS_TOLERANCE)
    assert ours.grad_norms == pytest.approx(theirs.grad_norms, rel=LOSS_TOLERANCE)
    assert ours.balances == pytest.approx(theirs.balances, rel=1e-6)
    assert ours.evaluated == pytest.approx(theirs.evaluated, rel=LOSS_TOLERANCE)
    gradients = [results.tensors(c.name, "gradients") for c in (case, reference)]
    error, name = worst(*gradients)
    assert error < GRADIENT_TOLERANCE, f"gradient of {name}: {error:.1e}"
    weights = [results.tensors(c.name, "weights") for c in (case, reference)]
    error, name = worst(*({k: v - before[k] for k, v in after.items()} for after in weights))
    assert error < UPDATE_TOLERANCE, f"update of {name}: {error:.1e}"
    # A bias moves by whole steps, by the sign of what its expert has too much or too little.
    for name in filter(is_bias, before):
        torch.testing.assert_close(weights[0][name], weights[1][name], msg=name)


def worst(ours: Tensors, theirs: Tensors) -> tuple[float, str]:
    """The weight with the largest difference, relative to its norm."""
    assert ours.keys() == theirs.keys()
    names = [name for name in theirs if not is_bias(name)]
    return max((_relative(ours[name], theirs[name]), name) for name in names)


def is_bias(name: str) -> bool:
    return name.endswith("e_score_correction_bias")


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))

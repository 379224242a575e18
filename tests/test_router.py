"""Routing against transformers' router; the balance loss against Megatron-Core's and by hand."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hf_reference import SMALL
from megatron.core import tensor_parallel
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from megatron_dsv3.config.architecture import DEEPSEEK_V3
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.config.sections import ExpertsSection
from megatron_dsv3.model.config import mcore_config
from megatron_dsv3.model.groups import Groups
from megatron_dsv3.model.router import DeepseekV3Layer, DeepseekV3Router, PackedRow

EXPERTS, HIDDEN, TOPK = 16, 32, 4
ARCH = replace(
    DEEPSEEK_V3, hidden_size=HIDDEN, num_layers=2, num_dense_layers=1, num_heads=2,
    num_experts=EXPERTS, num_experts_per_token=TOPK, num_groups=4, num_groups_per_token=2,
)  # fmt: skip
COEFFICIENT = 0.5


@pytest.fixture
def make(groups: Groups, monkeypatch) -> Callable[..., TopKRouter]:
    """A router with random weights and biases."""
    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", None)

    def build(
        cls: type[TopKRouter] = DeepseekV3Router,
        *,
        balance: float = 0.0,
        z_loss: float = 0.0,
        options: dict[str, Any] | None = None,
        **changes: Any,
    ) -> TopKRouter:
        arch = replace(ARCH, **changes)
        config = mcore_config(
            arch,
            Parallel(),
            dtype=torch.float32,
            device=groups.device,
            experts=ExpertsSection(aux_loss_coefficient=balance, z_loss_coefficient=z_loss),
            options=options,
        )
        router = cls(config=config, pg_collection=groups.collection)
        router.set_layer_number(1)
        generator = torch.Generator().manual_seed(1)
        router.weight.data.normal_(generator=generator)
        router.expert_bias.normal_(0.0, 0.3, generator=generator)
        return router

    return build


def _logits(*shape: int, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, EXPERTS, generator=generator).requires_grad_()


def _membership(documents: list[int], count: int) -> Tensor:
    """[tokens, 1, documents], as the router gets it; -1 is padding."""
    return (torch.tensor(documents)[:, None] == torch.arange(count))[:, None]


def _gradient(router: TopKRouter, logits: Tensor, *arguments: Any) -> Tensor:
    """Of the balance loss alone with respect to the logits."""
    probs, _ = router.routing(logits, *arguments)
    (gradient,) = torch.autograd.grad((probs * 0).sum(), logits)
    return gradient


# Precision


@pytest.mark.parametrize(
    "cast",
    [
        lambda module: module.bfloat16(),
        lambda module: module.half(),
        lambda module: module.to(torch.bfloat16),
        lambda module: module.to("cpu", torch.float16),
        lambda module: torch.nn.Sequential(module).bfloat16()[0],
    ],
    ids=["bfloat16", "half", "to", "to with device", "inside another module"],
)
def test_bias_and_counters_stay_fp32_to_the_bit_through_casts(make, cast):
    router = make()
    router.expert_bias.add_(5.0)
    router.local_tokens_per_expert.copy_(torch.arange(EXPERTS) + 1000)
    before = router.expert_bias.clone()
    assert not torch.equal(before.bfloat16().float(), before)
    router = cast(router)
    assert router.weight.dtype in (torch.bfloat16, torch.float16)
    assert router.expert_bias.dtype is router.local_tokens_per_expert.dtype is torch.float32
    assert torch.equal(router.expert_bias, before)
    assert router.local_tokens_per_expert.tolist() == [1000 + i for i in range(EXPERTS)]


def test_a_move_without_a_cast_moves_bias_and_counters(make):
    router = make().to("meta")
    assert router.expert_bias.is_meta
    assert router.local_tokens_per_expert.is_meta


def test_bias_is_saved_and_counters_are_not(make):
    assert set(make().state_dict()) == {"weight", "expert_bias"}


def test_a_bf16_router_still_scores_and_counts_in_fp32(make):
    router = make().bfloat16()
    hidden = torch.randn(300, 1, HIDDEN, generator=torch.Generator().manual_seed(3)).bfloat16()
    router.expert_bias.fill_(0.0)[:TOPK] = 9.0  # expert 0 is always chosen
    with torch.enable_grad():
        probs, _ = router(hidden)
        router(hidden)
    assert probs.dtype is torch.float32
    assert router.local_tokens_per_expert[0] == 600  # bf16 would stall at 256


# Choice and weights

COMBINATIONS = [
    # groups, groups kept, experts per token
    (1, 1, 2),
    (1, 1, 16),
    (2, 1, 4),
    (4, 2, 4),
    (4, 2, 6),  # Megatron-Core itself would score groups by their best three
    (4, 1, 2),  # and here
    (4, 4, 1),
    (8, 4, 8),
    (8, 3, 5),
]


@pytest.mark.parametrize(("num_groups", "kept", "topk"), COMBINATIONS)
@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "raw"])
def test_choice_and_weights_are_those_of_transformers(make, num_groups, kept, topk, normalize):
    ours = make(
        num_groups=num_groups,
        num_groups_per_token=kept,
        num_experts_per_token=topk,
        normalize_topk=normalize,
        routed_scaling_factor=1.7,
    )
    config = DeepseekV3Config(**{
        **SMALL, "hidden_size": HIDDEN, "n_routed_experts": EXPERTS, "n_group": num_groups,
        "topk_group": kept, "num_experts_per_tok": topk, "norm_topk_prob": normalize,
        "routed_scaling_factor": 1.7,
    })  # fmt: skip
    theirs = DeepseekV3TopkRouter(config)
    theirs.load_state_dict(
        {"weight": ours.weight, "e_score_correction_bias": ours.expert_bias}, strict=True
    )
    hidden = torch.randn(50, 3, HIDDEN, generator=torch.Generator().manual_seed(4)) * 0.3
    with torch.no_grad():
        probs, routing_map = ours(hidden)
        _, weights, chosen = theirs(hidden)
    expected = torch.zeros_like(probs).scatter(1, chosen, weights)
    assert torch.equal(routing_map, torch.zeros_like(routing_map).scatter(1, chosen, True))
    torch.testing.assert_close(probs, expected, rtol=1e-6, atol=1e-7)


def test_the_bias_decides_the_choice_and_not_the_weights(make):
    router = make()
    logits = _logits(20, 1)
    probs, routing_map = router.routing(logits)
    router.expert_bias.add_(0.7)  # for all experts alike
    shifted, same_map = router.routing(logits)
    assert torch.equal(routing_map, same_map)
    assert torch.equal(probs, shifted)
    router.expert_bias[5] += 100
    assert bool(router.routing(logits)[1][:, 5].all())
    assert not routing_map[:, 5].all()


def test_weights_pass_gradients_to_the_scores_and_none_to_the_bias(make):
    router = make()
    logits = _logits(10, 1)
    probs, routing_map = router.routing(logits)
    weight = torch.rand(probs.shape, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((probs * weight).sum(), logits)
    assert not router.expert_bias.requires_grad
    scores = logits.detach().flatten(0, 1).sigmoid().requires_grad_()
    kept = scores * routing_map
    normalised = kept / kept.sum(1, keepdim=True) * ARCH.routed_scaling_factor
    (normalised * weight).sum().backward()
    sigmoid = scores.detach()
    torch.testing.assert_close(gradient[:, 0], scores.grad * sigmoid * (1 - sigmoid))


# Statistics


def test_every_choice_of_a_real_token_is_counted_and_none_of_padding(make):
    router = make()
    documents = [0, 0, 0, -1, 1, 1, -1, -1]
    logits = _logits(len(documents), 1)
    _, routing_map = router.routing(logits, _membership(documents, 2))
    real = torch.tensor(documents) >= 0
    assert torch.equal(router.local_tokens_per_expert, routing_map[real].sum(0).float())
    assert router.local_tokens_per_expert.sum() == 5 * TOPK
    router.routing(logits, _membership(documents, 2))
    assert router.local_tokens_per_expert.sum() == 2 * 5 * TOPK


def test_without_documents_every_token_is_real(make):
    router = make()
    router.routing(_logits(6, 2))
    assert router.local_tokens_per_expert.sum() == 12 * TOPK


def test_nothing_is_counted_and_no_loss_attached_without_gradients(make):
    router = make(balance=COEFFICIENT)
    with torch.no_grad():
        probs, _ = router.routing(_logits(6, 1))
    assert not router.local_tokens_per_expert.any()
    assert not probs.requires_grad


def test_evaluation_has_no_balance_loss(make):
    router = make(balance=COEFFICIENT)
    logits = _logits(6, 1)
    assert _gradient(router, logits).any()
    router.eval()
    assert not _gradient(router, logits).any()


def test_recomputation_counts_once(make):
    router = make()
    logits = _logits(6, 1)
    probs = tensor_parallel.checkpoint(lambda x: router.routing(x)[0], False, logits)
    probs.sum().backward()
    assert router.local_tokens_per_expert.sum() == 6 * TOPK


# Balance loss


@pytest.mark.parametrize("batch", [1, 3])
def test_the_balance_loss_of_whole_rows_is_that_of_megatron(make, batch):
    """Its gradient; Megatron-Core's is the mean over rows times the rows' tokens."""
    length = 12
    stock = {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": COEFFICIENT}
    theirs, ours = make(TopKRouter, options=stock), make(balance=COEFFICIENT)
    ours.balance_weight = length * batch / batch
    logits = _logits(length, batch)
    expected = _gradient(theirs, logits)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(_gradient(ours, logits), expected, rtol=1e-6, atol=1e-9)


def _by_hand(logits: Tensor, documents: list[int], *, topk: int = TOPK) -> Tensor:
    """Paper eq. 17-20, document by document and expert by expert."""
    losses = []
    for document in sorted({d for d in documents if d >= 0}):
        rows = [logits[t, 0].sigmoid() for t, d in enumerate(documents) if d == document]
        best = [set(row.topk(topk).indices.tolist()) for row in rows]
        loss = torch.zeros(())
        for expert in range(EXPERTS):
            f = EXPERTS / (topk * len(rows)) * sum(expert in chosen for chosen in best)
            p = sum(row[expert] / row.sum() for row in rows) / len(rows)
            loss = loss + f * p
        losses.append(COEFFICIENT * loss)
    return torch.stack(losses)


PACKED = [0, 0, 0, 0, 0, -1, -1, 1, 1, -1, 2, 2, 2, 2, 2, 2, 2]


def test_the_balance_loss_is_the_mean_over_packed_documents(make):
    router = make(balance=COEFFICIENT)
    router.balance_weight = 1 / 3
    logits = _logits(len(PACKED), 1)
    ours = _gradient(router, logits, _membership(PACKED, 3))
    by_hand = _by_hand(logits, PACKED)
    (expected,) = torch.autograd.grad(by_hand.mean(), logits)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-8)
    assert expected.abs().max() > 1e-3


def test_the_value_of_the_balance_loss_is_that_by_hand(make, monkeypatch):
    values = []
    monkeypatch.setattr(
        MoEAuxLossAutoScaler, "apply", lambda probs, loss: values.append(loss) or probs
    )
    router = make(balance=COEFFICIENT)
    logits = _logits(len(PACKED), 1)
    router.routing(logits, _membership(PACKED, 3))
    torch.testing.assert_close(values[0], _by_hand(logits, PACKED).sum(), rtol=1e-6, atol=0)


def test_padding_has_no_part_in_the_balance_loss(make):
    router = make(balance=COEFFICIENT)
    logits, padding = _logits(len(PACKED), 1), torch.tensor(PACKED) < 0
    gradient = _gradient(router, logits, _membership(PACKED, 3))
    assert not gradient[padding].any()
    other = logits.detach().clone()
    other[padding] = 50.0
    changed = _gradient(router, other.requires_grad_(), _membership(PACKED, 3))
    assert torch.equal(gradient, changed)


def test_a_row_of_padding_alone_costs_nothing(make):
    router = make(balance=COEFFICIENT)
    gradient = _gradient(router, _logits(4, 1), _membership([-1] * 4, 1))
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_the_balance_loss_ignores_bias_groups_and_scaling(make):
    logits = _logits(10, 1)
    plain = _gradient(make(balance=COEFFICIENT), logits)
    router = make(
        balance=COEFFICIENT, num_groups=1, num_groups_per_token=1, routed_scaling_factor=1.0
    )
    router.expert_bias[3] = 100
    assert torch.equal(_gradient(router, logits), plain)


def test_the_loss_scale_of_the_schedule_reaches_the_balance_loss(make):
    router = make(balance=COEFFICIENT)
    logits = _logits(10, 1)
    plain = _gradient(router, logits)
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(8.0))
    torch.testing.assert_close(_gradient(router, logits), 8 * plain)


# Z loss


@pytest.mark.parametrize("batch", [1, 3])
def test_the_z_loss_of_whole_rows_is_that_of_megatron(make, batch):
    """Its gradient; Megatron-Core's is the mean over tokens times their number."""
    theirs, ours = make(TopKRouter, options={"moe_z_loss_coeff": 0.1}), make(z_loss=0.1)
    logits = _logits(12, batch)
    expected = _gradient(theirs, logits)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(_gradient(ours, logits), expected, rtol=1e-6, atol=1e-9)


def test_the_z_loss_is_the_mean_over_real_tokens(make):
    router, logits = make(z_loss=0.1), _logits(len(PACKED), 1)
    real = torch.tensor(PACKED) >= 0
    router.token_weight = 1 / real.sum().item()
    ours = _gradient(router, logits, _membership(PACKED, 3))
    by_hand = 0.1 * logits[real, 0].exp().sum(-1).log().square().mean()
    (expected,) = torch.autograd.grad(by_hand, logits)
    torch.testing.assert_close(ours, expected)
    assert not ours[~real].any()


def test_both_losses_add_up_and_neither_is_there_in_evaluation(make):
    logits = _logits(10, 1)
    parts = [_gradient(make(balance=COEFFICIENT), logits), _gradient(make(z_loss=0.1), logits)]
    router = make(balance=COEFFICIENT, z_loss=0.1)
    torch.testing.assert_close(_gradient(router, logits), parts[0] + parts[1])
    router.eval()
    assert not _gradient(router, logits).any()


# Documents on their way to the router


def _layer(tp_rank: int = 0, tp_size: int = 1, *, mtp_depth: int = 0) -> Any:
    group = SimpleNamespace(rank=lambda: tp_rank, size=lambda: tp_size)
    config = SimpleNamespace(sequence_parallel=tp_size > 1)
    return SimpleNamespace(
        config=config,
        pg_collection=SimpleNamespace(tp=group),
        is_mtp_layer=mtp_depth > 0,
        layer_number=mtp_depth or 7,
    )


def _row(documents: list[int], count: int, *more: list[int]) -> PackedRow:
    """`more`: of the MTP depths."""
    return PackedRow(documents=torch.tensor([documents, *more]), num_documents=count)


def test_an_mtp_layer_takes_the_documents_of_its_depth():
    row = _row([0, 0, 0, 1], 2, [0, 0, -1, -1], [0, -1, -1, -1])
    for depth, counted in enumerate(([True] * 4, [True] * 2 + [False] * 2, [True] + [False] * 3)):
        members = DeepseekV3Layer._membership(_layer(mtp_depth=depth), row)
        assert members.any(-1).tolist() == [counted]


def test_a_token_belongs_to_its_document_and_padding_to_none():
    members = DeepseekV3Layer._membership(_layer(), _row([0, 2, -1], 3))
    assert members.tolist() == [[[True, False, False], [False, False, True], [False] * 3]]


def test_sequence_parallel_ranks_see_their_own_tokens():
    row = _row([0, 0, 1, -1, 2, 2], 3)
    whole = DeepseekV3Layer._membership(_layer(), row)
    parts = [DeepseekV3Layer._membership(_layer(rank, 3), row) for rank in range(3)]
    assert torch.equal(torch.cat(parts, 1), whole)


def test_a_document_cut_by_sequence_parallelism_keeps_its_column():
    """Columns are summed over ranks, so they mean the same document on each."""
    row = _row([0, 0, 1, 1], 2)
    assert DeepseekV3Layer._membership(_layer(1, 2), row).tolist() == [[[False, True]] * 2]

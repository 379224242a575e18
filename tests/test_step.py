"""One training step against transformers and torch: rows, counts, losses, gradients, refusals."""

import math
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hf_reference
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hf_reference import Reference
from megatron.core.transformer.multi_token_prediction import roll_tensor
from torch import Tensor

from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.config.sections import ExpertsSection, OptimizerSection, SpikesSection
from megatron_dsv3.convert.bridge import Bridge
from megatron_dsv3.convert.hf_io import HFReader
from megatron_dsv3.convert.tensors import pieces_of
from megatron_dsv3.data.batch import Batch, make_batch, pack_batch
from megatron_dsv3.data.store import Sample
from megatron_dsv3.model.build import build_chunks, wrap
from megatron_dsv3.model.config import mcore_config
from megatron_dsv3.model.groups import Groups
from megatron_dsv3.train.optimizer import build_optimizer
from megatron_dsv3.train.spikes import NonFiniteError, SpikeError
from megatron_dsv3.train.step import (
    Counts,
    TrainStep,
    _weighted_sum,
    global_counts,
    loss_weights,
    to_row,
)

LENGTH, NUM_MTP, MTP_WEIGHT, VOCABULARY = 16, 2, 0.3, 128
MODEL = {"num_hidden_layers": 2, "num_mtp_layers": NUM_MTP}
PAD = 0
EMPTY_SAMPLE = Sample("", np.zeros(0, np.int32), np.zeros(0, np.bool_))


def _sample(length: int, name: str, *, seed: int = 0, counted: float = 0.7) -> Sample:
    generator = torch.Generator().manual_seed(seed + length)
    tokens = torch.randint(2, VOCABULARY, (length,), generator=generator, dtype=torch.int32)
    loss = torch.rand(length, generator=generator) < counted
    return Sample(name, tokens.numpy(), loss.numpy())


SAMPLES = [_sample(n, f"chats.jsonl:{i}", seed=i) for i, n in enumerate((16, 5, 11, 9))]


def _batch(*samples: Sample, length: int = LENGTH) -> Batch:
    return make_batch(samples, seq_length=length, num_mtp=NUM_MTP, pad_id=PAD)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return hf_reference.build(**MODEL)


@pytest.fixture(scope="module")
def hf_dir(reference, tmp_path_factory) -> Path:
    return reference.save(tmp_path_factory.mktemp("hf"))


@dataclass(frozen=True)
class Trainee:
    step: TrainStep
    bridge: Bridge

    def gradients(self) -> dict[str, Tensor]:
        """Under Hugging Face's names, as the step left them."""
        return {
            name: piece.clone()
            for param, tensor in self.bridge.local_tensors()
            if not param.is_buffer
            for name, piece in zip(param.hf, pieces_of(param, tensor.main_grad, 1), strict=True)
        }

    def tensors(self) -> dict[str, Tensor]:
        return {p.mcore: t.detach().clone() for p, t in self.bridge.local_tensors()}


@pytest.fixture
def make(groups, hf_dir) -> Callable[..., Trainee]:
    """The reference's weights behind a step; gradients are not clipped, so they can be compared."""
    arch = Architecture.from_hf(hf_dir)

    def build(
        *, balance: float = 0.0, spikes: SpikesSection = SpikesSection(), **policy: Any
    ) -> Trainee:
        experts = ExpertsSection(aux_loss_coefficient=balance, **policy)
        config = mcore_config(
            arch,
            Parallel(),
            dtype=torch.float32,
            device=groups.device,
            experts=experts,
        )
        chunks = build_chunks(
            arch, Parallel(), groups, config, max_seq_length=LENGTH, transformer_engine=False
        )
        bridge = Bridge(chunks, arch, Parallel(), groups)
        bridge.load(HFReader(hf_dir))
        wrapped = wrap(chunks, config)
        section = OptimizerSection(lr=1e-3, clip_grad=0.0)
        optimizer = build_optimizer(section, wrapped, dtype=torch.float32)
        step = TrainStep(
            wrapped,
            optimizer,
            groups,
            mtp_loss_weight=MTP_WEIGHT,
            experts=experts,
            spikes=spikes,
        )
        return Trainee(step, bridge)

    return build


# Rows


def test_a_row_is_the_samples_end_to_end(groups):
    batch = _batch(_sample(3, "a"), _sample(4, "b"), length=4)
    row = to_row(batch, groups)
    assert torch.equal(row.tokens, batch.tokens.reshape(1, 8))
    assert row.position_ids.tolist() == [[0, 1, 2, 3] * 2]
    assert row.labels.shape == row.loss_mask.shape == (1 + NUM_MTP, 1, 8)
    for depth in range(1 + NUM_MTP):
        assert torch.equal(row.labels[depth, 0], batch.labels[depth].flatten())
        assert torch.equal(row.loss_mask[depth, 0], batch.loss_mask[depth].flatten())


def test_the_tokens_ahead_are_those_that_megatron_core_shifts_to(groups):
    """Of four documents, three of them with padding behind."""
    batch = _packed(SAMPLES[:2], SAMPLES[2:], multiple=4)
    row = to_row(batch, groups)
    shifted = row.tokens
    for depth in range(1, 1 + NUM_MTP):
        shifted, _ = roll_tensor(shifted, packed_seq_params=row.packed)
        assert torch.equal(row.packed.tokens_ahead[depth - 1], shifted[0])
        assert row.packed.tokens_ahead[depth - 1].any()


def test_padding_belongs_to_no_document_and_lies_within_the_bounds_of_its_own(groups):
    row = to_row(_batch(_sample(3, "a"), EMPTY_SAMPLE, _sample(4, "b"), length=4), groups)
    packed = row.packed
    assert packed.documents.tolist() == [
        [0, 0, 0, -1, -1, -1, -1, -1, 2, 2, 2, 2],
        [0, 0, -1, -1, -1, -1, -1, -1, 2, 2, 2, -1],  # the last has no next one
        [0, -1, -1, -1, -1, -1, -1, -1, 2, 2, -1, -1],
    ]
    assert packed.num_documents == 3
    for bounds in (packed.cu_seqlens_q, packed.cu_seqlens_kv):
        assert (bounds.tolist(), bounds.dtype) == ([0, 4, 8, 12], torch.int32)
    assert (packed.qkv_format, packed.max_seqlen_q, packed.max_seqlen_kv) == ("thd", 4, 4)


def _under_cp(groups: Groups, rank: int, size: int) -> Groups:
    cp_group = SimpleNamespace(size=lambda: size, rank=lambda: rank)
    return replace(groups, cp_rank=rank, collection=SimpleNamespace(cp=cp_group))


@pytest.mark.parametrize("size", [2, 4])
def test_context_parallel_ranks_share_each_document_and_keep_token_and_target_together(
    groups, size
):
    batch = _batch(*SAMPLES[:3])
    whole = to_row(batch, groups)
    rows = [to_row(batch, _under_cp(groups, rank, size)) for rank in range(size)]

    def columns(row):
        """A token and all that is said of it."""
        documents = row.packed.documents
        parts = (row.tokens, row.position_ids, documents, row.labels[:, 0], row.loss_mask[:, 0])
        return torch.cat([part.double() for part in parts]).T.tolist()

    assert {row.tokens.size(1) for row in rows} == {3 * LENGTH // size}
    assert sorted(c for row in rows for c in columns(row)) == sorted(columns(whole))
    chunk = LENGTH // (2 * size)
    first = [*range(chunk), *range(LENGTH - chunk, LENGTH)]
    assert rows[0].position_ids.tolist() == [first * 3]
    for row in rows:  # attention is over whole documents, wherever their parts are
        assert row.packed.cu_seqlens_q.tolist() == [0, LENGTH, 2 * LENGTH, 3 * LENGTH]
        assert row.packed.num_documents == 3


def _packed(*rows: list[Sample], multiple: int, length: int = 2 * LENGTH) -> Batch:
    return pack_batch(rows, row_length=length, multiple=multiple, num_mtp=NUM_MTP, pad_id=PAD)


def test_packed_documents_keep_their_bounds_across_rows(groups):
    batch = _packed([_sample(3, "a"), _sample(5, "b")], [_sample(4, "c")], multiple=4, length=12)
    packed = to_row(batch, groups).packed
    assert packed.cu_seqlens_q.tolist() == [0, 4, 12, 16, 24]
    assert packed.documents[0].tolist() == [
        *(0, 0, 0, -1, 1, 1, 1, 1, 1, -1, -1, -1),
        *(2, 2, 2, 2, -1, -1, -1, -1, -1, -1, -1, -1),
    ]
    assert packed.num_documents == 4
    assert packed.max_seqlen_q == packed.max_seqlen_kv == 8


@pytest.mark.parametrize(("length", "bound"), [(1, 1), (4, 4), (5, 8), (9, 12), (12, 12)])
def test_the_longest_document_is_bounded_by_one_of_few_numbers(groups, length, bound):
    batch = _packed([_sample(length, "a")], multiple=1, length=12)
    assert max(length, 12 - length) <= to_row(batch, groups).packed.max_seqlen_q
    whole = _packed([_sample(length, str(i)) for i in range(12 // length)], multiple=1, length=12)
    assert to_row(whole, groups).packed.max_seqlen_q == bound


@pytest.mark.parametrize("size", [2, 4])
def test_context_parallel_ranks_share_each_packed_document(groups, size):
    batch = _packed(SAMPLES[:3], [SAMPLES[3]], multiple=2 * size, length=48)
    whole = to_row(batch, groups)
    rows = [to_row(batch, _under_cp(groups, rank, size)) for rank in range(size)]
    tokens = [row.tokens.tolist()[0] for row in rows]
    assert sorted(t for part in tokens for t in part) == sorted(whole.tokens.tolist()[0])
    for rank, row in enumerate(rows):
        assert row.packed.cu_seqlens_q.tolist() == batch.bounds.tolist()
        expected = []
        for bound, next_bound in pairwise(batch.bounds.tolist()):
            chunk = (next_bound - bound) // (2 * size)
            for part in (rank, 2 * size - 1 - rank):
                first = bound + part * chunk
                expected += whole.labels[0, 0, first : first + chunk].tolist()
        assert row.labels[0, 0].tolist() == expected
    ahead = [row.packed.tokens_ahead for row in rows]
    counted = [(part.labels[:, 0] != 0) for part in rows]
    for part, mine, labels in zip(ahead, counted, (row.labels[:, 0] for row in rows), strict=True):
        assert torch.equal(part[mine[:-1]], labels[:-1][mine[:-1]])


# Counts and weights


def _counts(batches: list[Batch], groups: Groups) -> Counts:
    return Counts.of(global_counts(batches, groups).cpu())


def test_counts_of_packed_rows_are_those_of_padded_ones(groups):
    padded = _counts([_batch(*SAMPLES)], groups)
    packed = _counts([_packed(SAMPLES[:2], SAMPLES[2:], [], multiple=2)], groups)
    assert torch.equal(padded.counted, packed.counted)
    assert replace(padded, counted=packed.counted) == packed


def test_counts_by_hand(groups):
    loss = np.array([0, 1, 0, 1, 1], np.bool_)
    five = Sample("five", np.arange(5, dtype=np.int32), loss)
    two = Sample("two", np.arange(2, dtype=np.int32), np.ones(2, np.bool_))
    counts = _counts([_batch(five, EMPTY_SAMPLE), _batch(two, five)], groups)
    # five predicts tokens 1, 3, 4; from two tokens before 3, 4; from three tokens before 3, 4.
    assert counts.counted.tolist() == [3 + 1 + 3, 2 + 0 + 2, 2 + 0 + 2]
    assert counts.counted.dtype is torch.float64
    assert (counts.documents, counts.tokens, counts.squares) == (3, 12, 25 + 4 + 25)


def test_counts_are_summed_over_data_parallel_ranks(groups, monkeypatch):
    """As if the other rank had the same."""
    over = []

    def all_reduce(tensor, op=None, group=None):
        over.append(group)
        tensor.mul_(2)

    alone = _counts([_batch(*SAMPLES)], groups)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    both = _counts([_batch(*SAMPLES)], groups)
    assert over == [groups.collection.dp]
    assert torch.equal(both.counted, 2 * alone.counted)
    assert (both.documents, both.tokens) == (2 * alone.documents, 2 * alone.tokens)
    assert both.squares == 2 * alone.squares


@pytest.mark.parametrize(
    ("counted", "weight", "expected"),
    [
        ([10], 0.3, [0.1]),
        ([10, 5], 0.3, [0.1, 0.06]),
        ([16, 8, 4], 0.5, [0.0625, 0.03125, 0.0625]),
        ([16, 8, 0], 0.5, [0.0625, 0.03125, 0.0]),
        ([16, 8, 4], 0.0, [0.0625, 0.0, 0.0]),
    ],
)
def test_loss_weights_by_hand(counted, weight, expected):
    weights = loss_weights(torch.tensor(counted, dtype=torch.float64), weight)
    assert weights.dtype is torch.float32
    torch.testing.assert_close(weights, torch.tensor(expected))


# The step


def _expected_losses(reference: Reference, samples: list[Sample]) -> Tensor:
    """Mean loss by depth, each sample alone and unpadded."""
    sums, counted = torch.zeros(1 + NUM_MTP), torch.zeros(1 + NUM_MTP)
    for sample in samples:
        tokens = torch.from_numpy(sample.tokens).long()
        logits = reference.logits(tokens[None])
        for depth in range(1 + NUM_MTP):
            shift = 1 + depth
            keep = torch.from_numpy(sample.loss[shift:].copy())
            losses = F.cross_entropy(logits[depth][0, :-shift], tokens[shift:], reduction="none")
            sums[depth] = sums[depth] + (losses * keep).sum()
            counted[depth] += keep.sum()
    return sums / counted


ACCUMULATED = {
    "one micro-batch": [SAMPLES],
    "four micro-batches": [[sample] for sample in SAMPLES],
    "three of unequal counts": [SAMPLES[:1], SAMPLES[1:2], [SAMPLES[2], SAMPLES[3]]],
    "with an empty sample": [SAMPLES, [EMPTY_SAMPLE]],
}


@pytest.mark.parametrize("micro_batches", ACCUMULATED.values(), ids=ACCUMULATED.keys())
def test_losses_and_gradients_are_those_of_transformers(make, reference, micro_batches):
    trainee = make()
    result = trainee.step([_batch(*samples) for samples in micro_batches])
    for parameter in [*reference.model.parameters(), *reference.mtp.parameters()]:
        parameter.grad = None
    expected = _expected_losses(reference, SAMPLES)
    assert result.losses.main == pytest.approx(expected[0].item(), rel=1e-5)
    assert result.losses.mtp == pytest.approx(expected[1:].mean().item(), rel=1e-5)
    (expected[0] + MTP_WEIGHT * expected[1:].mean()).backward()
    theirs, ours = reference.gradients(), trainee.gradients()
    assert ours.keys() == theirs.keys()
    # An expert that no token chose has a gradient of zero here and none there.
    theirs = {n: torch.zeros_like(ours[n]) if g is None else g for n, g in theirs.items()}
    for name, gradient in theirs.items():
        error = (ours[name] - gradient).norm() / gradient.norm().clamp(min=1e-9)
        assert error < 1e-4, f"{name}: {error:.1e}"
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in theirs.values()))
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)
    assert result.counts.tokens == 16 + 5 + 11 + 9
    assert result.counts.documents == 4


def test_accumulation_does_not_change_the_balance_loss(make):
    """It is a mean over documents, whatever micro-batch they are in."""
    plain = make()
    plain.step([_batch(*SAMPLES)])
    gradients = []
    for name in ("one micro-batch", "four micro-batches", "with an empty sample"):
        micro_batches = ACCUMULATED[name]
        trainee = make(balance=0.1)
        trainee.step([_batch(*samples) for samples in micro_batches])
        gradients.append(trainee.gradients())
    routers = [name for name in gradients[0] if name.endswith("mlp.gate.weight")]
    assert len(routers) == 1 + NUM_MTP
    for name in routers:
        assert not torch.allclose(gradients[0][name], plain.gradients()[name], rtol=0.01)
        for other in gradients[1:]:
            torch.testing.assert_close(other[name], gradients[0][name], rtol=1e-4, atol=1e-6)


def test_the_routers_losses_are_means_over_the_documents_and_tokens_of_the_step(make):
    """Of the last router, behind which only its own losses depend on its weight."""
    micro_batches = [_batch(*SAMPLES[:3]), _batch(SAMPLES[3], EMPTY_SAMPLE)]
    plain, trainee = make(), make(balance=0.1, z_loss_coefficient=0.01)
    router, inputs = trainee.step.routers[-1], []
    router.register_forward_hook(lambda _, args, __: inputs.append(args[0].detach()[:, 0]))
    weight = router.weight.detach().clone().requires_grad_()
    plain.step(micro_batches)
    trainee.step(micro_batches)
    documents = []
    for hidden, batch in zip(inputs, micro_batches, strict=True):
        rows = (hidden @ weight.T).split(LENGTH)
        lengths = (~batch.padding).sum(1).tolist()
        # The last router is of depth 2, which has no second next token for a document's last two.
        documents += [row[: n - 2] for row, n in zip(rows, lengths, strict=True) if n]
    squares = torch.cat(documents).logsumexp(-1).square()
    expected = (
        0.1 * torch.stack([_balance(d) for d in documents]).mean() + 0.01 * squares.sum() / 41
    )
    (gradient,) = torch.autograd.grad(expected, weight)
    name = next(n for n in reversed(plain.gradients()) if n.endswith("mlp.gate.weight"))
    difference = trainee.gradients()[name] - plain.gradients()[name]
    torch.testing.assert_close(difference, gradient, rtol=1e-3, atol=1e-6)


def _balance(logits: Tensor) -> Tensor:
    """Paper eq. 17-20 of one document [tokens, experts], without alpha."""
    num_experts, topk = logits.size(1), hf_reference.SMALL["num_experts_per_tok"]
    scores = logits.sigmoid()
    chosen = F.one_hot(scores.topk(topk).indices, num_experts).sum(1)
    f = num_experts / topk * chosen.float().mean(0)
    return (f * (scores / scores.sum(1, keepdim=True)).mean(0)).sum()


def test_what_padding_holds_changes_nothing(make):
    batch = _batch(*SAMPLES)
    outcomes = []
    for tokens in (batch.tokens, torch.where(batch.padding, 77, batch.tokens)):
        trainee = make()
        loads = []
        trainee.step.routers[0].register_forward_hook(
            lambda router, *_, loads=loads: loads.append(router.local_tokens_per_expert.clone())
        )
        result = trainee.step([replace(batch, tokens=tokens)])
        outcomes.append((result, trainee.gradients(), loads))
    (plain, ours, load), (noisy, theirs, other_load) = outcomes
    assert plain.losses.main == pytest.approx(noisy.losses.main, rel=1e-6)
    assert plain.losses.mtp == pytest.approx(noisy.losses.mtp, rel=1e-6)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-7, msg=name)
    assert load[0].sum() == 41 * 4
    assert torch.equal(load[0], other_load[0])


def test_a_step_changes_the_weights_and_leaves_the_next_one_clean(make):
    """The second step's gradients are of the second batch alone."""
    trainee, fresh = make(), make()
    before = trainee.tensors()
    first = trainee.step([_batch(*SAMPLES[:2])])
    after = trainee.tensors()
    biases = {name for name in before if name.endswith("expert_bias")}
    assert len(biases) == 1 + NUM_MTP
    same = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
    assert biases <= same
    assert not {name for name in same - biases if ".experts." not in name}
    for part in trainee.bridge.local_tensors():
        part[1].data.copy_(before[part[0].mcore])
    again = trainee.step([_batch(*SAMPLES[2:])])
    alone = fresh.step([_batch(*SAMPLES[2:])])
    assert again.losses.main == pytest.approx(alone.losses.main, rel=1e-6)
    assert again.losses.main != pytest.approx(first.losses.main, rel=1e-3)
    assert again.expert_balance == alone.expert_balance
    theirs = fresh.gradients()
    for name, gradient in trainee.gradients().items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-7, msg=name)


def _record_loads(step: TrainStep, batches: list[Batch]) -> list[Tensor]:
    """Fills with each router's choices of real tokens while the step runs.

    The main model's layer, then an MTP layer a depth: depth k has no k-th next token at the end of
    a document.
    """
    loads = [torch.zeros(16) for _ in step.routers]
    for depth, (load, router) in enumerate(zip(loads, step.routers, strict=True)):
        lengths = [(~batch.padding).sum(1, keepdim=True) - depth for batch in batches]
        real = iter([(torch.arange(LENGTH) < length).flatten() for length in lengths])

        def add(_, __, output, load=load, real=real):
            load += output[1][next(real)].sum(0)

        router.register_forward_hook(add)
    return loads


def test_expert_balance_is_the_largest_load_over_the_mean_by_hand(make):
    trainee = make()
    batches = [_batch(*SAMPLES[:3]), _batch(SAMPLES[3], EMPTY_SAMPLE)]
    loads = _record_loads(trainee.step, batches)
    result = trainee.step(batches)
    assert [load.sum() for load in loads] == [41 * 4, (41 - 4) * 4, (41 - 8) * 4]
    expected = sum(float(load.max() / load.mean()) for load in loads) / len(loads)
    assert result.expert_balance == pytest.approx(expected, rel=1e-6)


def test_biases_move_by_the_rate_towards_balance(make):
    trainee = make(bias="update", bias_update_rate=0.01)
    batches = [_batch(*SAMPLES[:3]), _batch(SAMPLES[3], EMPTY_SAMPLE)]
    loads = _record_loads(trainee.step, batches)
    before = [router.expert_bias.clone() for router in trainee.step.routers]
    trainee.step(batches)
    for router, bias, load in zip(trainee.step.routers, before, loads, strict=True):
        moved = router.expert_bias - bias
        torch.testing.assert_close(moved, 0.01 * (load.mean() - load).sign(), rtol=1e-4, atol=0)


def test_what_is_about_to_be_saved_has_its_biases_in_fp32(make):
    step = make().step
    step.settle()
    step.routers[0].expert_bias = step.routers[0].expert_bias.bfloat16()
    with pytest.raises(AssertionError, match="layer 1: expert bias or counter is"):
        step.settle()


# Evaluation


def test_evaluation_gives_the_losses_of_a_step_and_leaves_no_trace(make):
    trainee, fresh = make(balance=0.1, bias="update"), make(balance=0.1, bias="update")
    batches = [_batch(*SAMPLES[:2]), _batch(*SAMPLES[2:])]
    before = trainee.tensors()
    losses = trainee.step.evaluate(batches)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainee.tensors().items())
    assert not any(router.local_tokens_per_expert.any() for router in trainee.step.routers)
    assert all(chunk.training for chunk in trainee.step.chunks)
    result, expected = trainee.step(batches), fresh.step(batches)
    assert losses == result.losses
    assert result.losses == expected.losses
    assert result.grad_norm == expected.grad_norm


def test_an_evaluation_that_fails_leaves_the_model_training(make):
    trainee = make()
    trainee.bridge.chunks[0].output_layer.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainee.step.evaluate([_batch(*SAMPLES)])
    assert all(chunk.training for chunk in trainee.step.chunks)


def test_evaluation_of_nothing_counted_is_zero(make):
    silent = _sample(6, "silent", counted=0.0)
    losses = make().step.evaluate([_batch(silent, EMPTY_SAMPLE)])
    assert (losses.main, losses.mtp) == (0.0, 0.0)


# What is refused


def _poison(trainee: Trainee, token: int) -> None:
    model = trainee.bridge.chunks[0]
    model.embedding.word_embeddings.weight.data[token] = math.inf


@pytest.mark.parametrize("bias", ["freeze", "update"])
def test_a_loss_that_is_not_finite_names_the_samples_and_changes_nothing(make, bias):
    trainee = make(bias=bias)
    only_here = set(SAMPLES[1].tokens) - {t for i in (0, 2, 3) for t in SAMPLES[i].tokens}
    _poison(trainee, int(next(iter(only_here))))
    before = trainee.tensors()
    message = r"^loss is not finite; rank 0: samples chats.jsonl:1$"
    with pytest.raises(NonFiniteError, match=message):
        trainee.step([_batch(sample) for sample in SAMPLES])
    changed = [n for n, t in trainee.tensors().items() if not torch.equal(t, before[n])]
    assert not changed


@pytest.mark.parametrize("bias", ["freeze", "update"])
def test_a_gradient_that_is_not_finite_names_the_samples_and_changes_nothing(make, bias):
    trainee = make(bias=bias)
    before = trainee.tensors()
    head = trainee.bridge.chunks[0].output_layer.weight
    head.register_hook(lambda gradient: gradient * math.nan)
    message = r"^gradient norm is nan; losses were finite; samples chats.jsonl:0, chats.jsonl:1$"
    with pytest.raises(NonFiniteError, match=message):
        trainee.step([_batch(sample) for sample in SAMPLES[:2]])
    changed = [n for n, t in trainee.tensors().items() if not torch.equal(t, before[n])]
    assert not changed


def test_a_global_batch_without_a_counted_token_is_refused_before_the_update(make):
    trainee = make()
    before = trainee.tensors()
    with pytest.raises(ValueError, match="no counted token"):
        trainee.step([_batch(EMPTY_SAMPLE, EMPTY_SAMPLE)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainee.tensors().items())


def test_a_signal_to_any_rank_is_agreed_on_with_the_losses(make, monkeypatch):
    trainee, plain = make(), dist.all_reduce
    expected = make().step([_batch(*SAMPLES)])
    request = trainee.step.stop_request

    def as_if_another_rank_had_been_told(tensor, *args, **options):
        if tensor.shape == (1 + NUM_MTP + 2,):
            tensor[-1] += 1
        return plain(tensor, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(dist, "all_reduce", as_if_another_rank_had_been_told)
        assert trainee.step([_batch(*SAMPLES)]).losses == expected.losses
    assert request.agreed
    assert request.received is None
    trainee.step([_batch(*SAMPLES)])
    assert not request.agreed
    request.note(signal.SIGTERM, None)
    trainee.step([_batch(*SAMPLES)])
    assert request.agreed


SKIP = SpikesSection(action="skip", factor=1.5, window=2)


def test_a_step_that_is_not_finite_can_be_left_out_and_the_next_one_done(make):
    trainee, fresh = make(bias="update", spikes=SKIP), make(bias="update", spikes=SKIP)
    hook = trainee.bridge.chunks[0].output_layer.weight.register_hook(lambda g: g * math.inf)
    result = trainee.step([_batch(*SAMPLES)])
    assert result.skipped is not None
    assert result.skipped.startswith("gradient norm is inf; losses were finite; samples chats")
    assert trainee.step.guard.num_skipped == 1
    hook.remove()
    after, expected = trainee.step([_batch(*SAMPLES)]), fresh.step([_batch(*SAMPLES)])
    assert after.skipped is expected.skipped is None
    assert (after.losses, after.grad_norm) == (expected.losses, expected.grad_norm)
    theirs = fresh.tensors()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in trainee.tensors().items())


@pytest.mark.parametrize("action", ["stop", "skip"])
def test_a_loss_far_above_those_before_it_is_not_trained_on(make, action):
    trainee = make(bias="update", spikes=SKIP.model_copy(update={"action": action}))
    for _ in range(2):
        trainee.step([_batch(*SAMPLES)])
    trainee.bridge.chunks[0].output_layer.weight.data.mul_(20)
    before = trainee.tensors()
    message = r"loss [\d.]+ is more than 1.5 times the median [\d.]+; samples chats.jsonl:0"
    if action == "stop":
        with pytest.raises(SpikeError, match=message):
            trainee.step([_batch(*SAMPLES)])
    else:
        assert re.match(message, trainee.step([_batch(*SAMPLES)]).skipped)
    changed = [n for n, t in trainee.tensors().items() if not torch.equal(t, before[n])]
    assert not changed


@pytest.mark.parametrize("kind", ["gradient", "spike"])
def test_every_rank_names_the_samples_of_the_global_batch(make, groups, monkeypatch, kind):
    """As if there were another data-parallel rank, whose half batch is filled up."""
    trainee, over = make(spikes=SKIP), []

    def all_gather_object(everyones, mine, group=None):
        over.append(group)
        everyones[:] = [["chats.jsonl:7"], mine]

    if kind == "spike":
        trainee.step.guard.recent.extend([0.1, 0.1])
    else:
        trainee.bridge.chunks[0].output_layer.weight.register_hook(lambda g: g * math.nan)
    monkeypatch.setattr(dist, "all_gather_object", all_gather_object)
    result = trainee.step([_batch(SAMPLES[2]), _batch(EMPTY_SAMPLE)])
    assert over == [groups.collection.dp]
    assert result.skipped.endswith("; samples chats.jsonl:7, chats.jsonl:2")


def test_many_samples_are_named_by_the_first_eight(make):
    trainee = make()
    many = [_sample(4, f"s{i}", seed=i) for i in range(11)]
    trainee.bridge.chunks[0].output_layer.weight.data.fill_(math.nan)
    names = ", ".join(f"s{i}" for i in range(8))
    with pytest.raises(NonFiniteError, match=rf"samples {names} and 3 more$"):
        trainee.step([_batch(*many[:6]), _batch(*many[6:])])


def test_a_batch_without_a_counted_token_is_refused(make):
    silent = _sample(6, "silent", counted=0.0)
    with pytest.raises(ValueError, match="the global batch holds no counted token"):
        make().step([_batch(silent, EMPTY_SAMPLE)])


def test_a_loss_that_is_masked_may_be_infinite(groups):
    """The label of padding is 0, which a model may rule out altogether."""
    row = to_row(_batch(*SAMPLES), groups)
    losses = torch.ones_like(row.loss_mask)
    losses[row.loss_mask == 0] = math.inf
    total, counted, report = _weighted_sum(
        losses, mask=row.loss_mask, weights=torch.tensor([1.0, 2.0, 3.0])
    )
    sums = row.loss_mask.sum((1, 2))
    assert torch.equal(report["sums"], sums)
    assert total == sums[0] + 2 * sums[1] + 3 * sums[2]
    assert (counted.item(), counted.dtype) == (sums[0], torch.int32)

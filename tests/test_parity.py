"""The model against transformers in fp32: logits, MTP logits and every gradient, on random weights.

Each architecture that `Architecture.from_hf` reads differently is a case. The negative tests show
that the comparison would see each of the mistakes that a port can make.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import hf_reference
import pytest
import torch
import torch.nn.functional as F
from hf_reference import SMALL, YARN, Reference
from torch import Tensor

from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.config.sections import ExpertsSection
from megatron_dsv3.convert.bridge import Bridge
from megatron_dsv3.convert.hf_io import HFReader
from megatron_dsv3.convert.tensors import pieces_of
from megatron_dsv3.model.build import build_chunks
from megatron_dsv3.model.config import mcore_config
from megatron_dsv3.model.gpt import DeepseekV3Model
from megatron_dsv3.model.groups import Groups
from megatron_dsv3.model.router import PackedRow

LENGTH = 48
LOGIT_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4

CASES = {
    "the V3 shape in small": {},
    "no q_lora_rank": {"q_lora_rank": None},
    "one group": {"n_group": 1, "topk_group": 1},
    "groups scored by their best two at any ratio": {"num_experts_per_tok": 6},
    "scores not normalised": {"norm_topk_prob": False},
    "two shared experts": {"n_shared_experts": 2},
    "plain rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "yarn without mscale": {
        "rope_parameters": {k: v for k, v in YARN.items() if not k.startswith("mscale")}
    },
    "yarn with unequal mscales": {
        "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}
    },
    "yarn without truncation": {"rope_parameters": {**YARN, "truncate": False}},
    "another epsilon, which the latent norms do not follow": {"rms_norm_eps": 1e-3},
    "two MTP layers": {"num_mtp_layers": 2},
    "no MTP layer": {"num_mtp_layers": 0},
    "tied embeddings": {"tie_word_embeddings": True},
}


@dataclass(frozen=True)
class Case:
    reference: Reference
    arch: Architecture
    bridge: Bridge

    @property
    def model(self) -> DeepseekV3Model:
        return self.bridge.chunks[0]

    def logits(self, tokens: Tensor) -> list[Tensor]:
        positions = torch.arange(tokens.size(1)).expand_as(tokens)
        return list(self.model(tokens, positions, None))

    def worst_logit(self, tokens: Tensor) -> float:
        with torch.no_grad():
            pairs = zip(self.logits(tokens), self.reference.logits(tokens), strict=True)
            return max((ours - theirs).abs().max().item() for ours, theirs in pairs)


@pytest.fixture
def make(groups: Groups, tmp_path) -> Callable[..., Case]:
    def build(
        changes: dict, *, alter: Callable[[Architecture], Architecture] | None = None
    ) -> Case:
        reference = hf_reference.build(**changes)
        directory = reference.save(tmp_path / "hf")
        arch = Architecture.from_hf(directory)
        built = alter(arch) if alter else arch
        config = mcore_config(
            built,
            Parallel(),
            dtype=torch.float32,
            device=groups.device,
            experts=ExpertsSection(aux_loss_coefficient=0.0),
        )
        chunks = build_chunks(
            built, Parallel(), groups, config, max_seq_length=LENGTH, transformer_engine=False
        )
        bridge = Bridge(chunks, arch, Parallel(), groups)
        bridge.load(HFReader(directory))
        return Case(reference, arch, bridge)

    return build


@pytest.fixture
def tokens() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, SMALL["vocab_size"], (2, LENGTH), generator=generator)


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_logits_of_every_depth_are_those_of_transformers(make, tokens, changes):
    case = make(changes)
    assert len(case.logits(tokens)) == 1 + case.arch.num_mtp_layers
    assert case.worst_logit(tokens) < LOGIT_TOLERANCE


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_every_gradient_of_the_token_loss_is_that_of_transformers(make, tokens, changes):
    case = make(changes)
    depths = 1 + case.arch.num_mtp_layers
    labels = torch.stack([F.pad(tokens[:, d + 1 :], (0, d + 1)) for d in range(depths)])
    losses = case.model(tokens, torch.arange(LENGTH).expand_as(tokens), None, labels=labels)
    losses.sum().backward()
    reference = [
        F.cross_entropy(logits.flatten(0, 1), label.flatten(), reduction="sum")
        for logits, label in zip(case.reference.logits(tokens), labels, strict=True)
    ]
    sum(reference).backward()
    assert torch.allclose(losses.sum((1, 2)), torch.stack(reference), rtol=1e-5)
    theirs = case.reference.gradients()
    compared = set()
    for param, tensor in case.bridge.local_tensors():
        if param.is_buffer:
            continue
        for name, ours in zip(param.hf, pieces_of(param, tensor.grad, 1), strict=True):
            error = (ours - theirs[name]).norm() / theirs[name].norm().clamp(min=1e-12)
            assert error < GRADIENT_TOLERANCE, f"{name}: relative error {error:.1e}"
            compared.add(name)
    assert compared == theirs.keys()


def _swap_gate_and_up(case: Case) -> None:
    for param, tensor in case.bridge.local_tensors():
        if len(param.hf) == 2:
            tensor.data = torch.cat(tensor.data.chunk(2)[::-1])


def _zero_bias(case: Case) -> None:
    for param, tensor in case.bridge.local_tensors():
        if param.is_buffer:
            tensor.zero_()


def _bf16_bias(case: Case) -> None:
    for param, tensor in case.bridge.local_tensors():
        if param.is_buffer:
            tensor.copy_((tensor + 5).bfloat16().float() - 5)


MISTAKES = {
    "scaling factor": lambda a: replace(a, routed_scaling_factor=1.0),
    "groups": lambda a: replace(a, num_groups=1, num_groups_per_token=1),
    "eps": lambda a: replace(a, rms_norm_eps=1e-5),
    "rope type": lambda a: replace(a, yarn=None),
    "mscale of the softmax": lambda a: replace(a, yarn=replace(a.yarn, mscale_all_dim=None)),
    "normalisation": lambda a: replace(a, normalize_topk=False),
    "top-k": lambda a: replace(a, num_experts_per_token=3),
}
DAMAGES = {
    "gate and up swapped": _swap_gate_and_up,
    "bias dropped": _zero_bias,
    "bias through bf16": _bf16_bias,
}


@pytest.mark.parametrize("alter", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_wrong_number_in_the_architecture_would_be_seen(make, tokens, alter):
    assert make({}, alter=alter).worst_logit(tokens) > 100 * LOGIT_TOLERANCE


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_weights_would_be_seen(make, tokens, damage):
    case = make({})
    damage(case)
    assert case.worst_logit(tokens) > 100 * LOGIT_TOLERANCE


def test_packed_documents_do_not_see_one_another(make, tokens):
    case = make({})
    bounds = torch.tensor([0, LENGTH, 2 * LENGTH], dtype=torch.int32)
    packed = PackedRow(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=LENGTH,
        max_seqlen_kv=LENGTH,
        documents=torch.arange(2).repeat_interleave(LENGTH).repeat(2, 1),
        num_documents=2,
    )
    positions = torch.arange(LENGTH).repeat(2)[None]
    with torch.no_grad():
        row = case.model(tokens.reshape(1, -1), positions, None, packed_seq_params=packed)
        alone = torch.stack(case.reference.logits(tokens))
    assert (row.reshape(alone.shape) - alone).abs().max() < LOGIT_TOLERANCE

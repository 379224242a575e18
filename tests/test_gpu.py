"""The same model with Transformer Engine's modules on a GPU, against transformers in fp32.

`make test-gpu` runs all `gpu` tests in one process: starting takes most of a minute.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import hf_reference
import pytest
import torch
import torch.nn.functional as F
from hf_reference import REAL_HEADS, Reference
from torch import Tensor

from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.config.sections import ExpertsSection
from megatron_dsv3.convert.bridge import Bridge
from megatron_dsv3.convert.hf_io import HFReader
from megatron_dsv3.convert.tensors import pieces_of
from megatron_dsv3.model.build import build_chunks, routers, wrap
from megatron_dsv3.model.config import mcore_config
from megatron_dsv3.model.groups import Groups
from megatron_dsv3.model.router import PackedRow

pytestmark = pytest.mark.gpu

LENGTH = 128
DTYPES = (torch.float32, torch.bfloat16)
FP32_TOLERANCE = 1e-4
# In bf16 the yardstick is what transformers' own bf16 model makes of the same weights.
PEER_RATIO = 1.5


@pytest.fixture(scope="module")
def reference() -> Reference:
    return hf_reference.build(bias_std=100.0, **REAL_HEADS)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 128, (2, LENGTH), generator=torch.Generator().manual_seed(3))


def _bridge(reference: Reference, directory: Path, groups: Groups, dtype: torch.dtype) -> Bridge:
    reference.save(directory, dtype=dtype)
    arch = Architecture.from_hf(directory)
    experts = ExpertsSection(aux_loss_coefficient=0.0)
    config = mcore_config(arch, Parallel(), dtype=dtype, device=groups.device, experts=experts)
    chunks = build_chunks(
        arch, Parallel(), groups, config, max_seq_length=2 * LENGTH, transformer_engine=True
    )
    bridge = Bridge(chunks, arch, Parallel(), groups)
    bridge.load(HFReader(directory))
    return bridge


def _packed(num_documents: int, device: torch.device) -> PackedRow:
    bounds = torch.arange(num_documents + 1, dtype=torch.int32, device=device) * LENGTH
    return PackedRow(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=LENGTH,
        max_seqlen_kv=LENGTH,
        documents=torch.arange(num_documents, device=device).repeat_interleave(LENGTH).repeat(2, 1),
        num_documents=num_documents,
    )


def _error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float().cpu() - theirs).norm() / theirs.norm())


@dataclass(frozen=True)
class Outcome:
    """Of one model on one input."""

    logits: list[Tensor]
    gradients: dict[str, Tensor]


def _transformers(reference: Reference, tokens: Tensor, labels: Tensor) -> Outcome:
    reference.model.zero_grad()
    reference.mtp.zero_grad()
    logits = reference.logits(tokens)
    sum(
        F.cross_entropy(depth.float().flatten(0, 1), label.flatten(), reduction="sum")
        for depth, label in zip(logits, labels, strict=True)
    ).backward()
    return Outcome(
        [depth.detach().float().cpu() for depth in logits],
        {name: gradient.float().cpu() for name, gradient in reference.gradients().items()},
    )


@pytest.fixture(scope="module")
def exact(reference, tokens) -> Outcome:
    """transformers in fp32 on the CPU."""
    return _transformers(reference, tokens, _labels(tokens))


@pytest.fixture(scope="module")
def peer(reference, tokens) -> Outcome:
    """transformers in bf16 on the GPU; the experts' biases stay fp32, as they do with us."""
    half = copy.deepcopy(reference)
    for module in (half.model, half.mtp):
        biases = {n: b.clone() for n, b in module.named_buffers() if n.endswith("correction_bias")}
        module.to("cuda", torch.bfloat16)
        for name, bias in biases.items():
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, bias.cuda())
    return _transformers(half, tokens.cuda(), _labels(tokens).cuda())


def _labels(tokens: Tensor) -> Tensor:
    return torch.stack([F.pad(tokens[:, depth + 1 :], (0, depth + 1)) for depth in range(2)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_logits_and_gradients_are_those_of_transformers(
    groups, reference, tokens, exact, peer, tmp_path, dtype, packed
):
    if packed and dtype is torch.float32:
        pytest.skip("cuDNN has no fp32 attention, and unfused attention no packed rows")
    bridge = _bridge(reference, tmp_path, groups, dtype)
    [model] = bridge.chunks
    rows, marked = tokens.cuda(), _labels(tokens).cuda()
    row = None
    if packed:
        rows, marked, row = rows.view(1, -1), marked.view(2, 1, -1), _packed(2, groups.device)
    positions = torch.arange(LENGTH, device="cuda").expand(2, LENGTH).reshape(rows.shape)
    with torch.no_grad():
        ours = model(rows, positions, None, packed_seq_params=row)
    for depth, logits in enumerate(exact.logits):
        bound = FP32_TOLERANCE
        if dtype is torch.bfloat16:
            bound = PEER_RATIO * _error(peer.logits[depth], logits)
        assert _error(ours[depth].view(logits.shape), logits) < bound
    wrapped = wrap([model], model.config)
    wrapped[0].zero_grad_buffer()
    wrapped[0](rows, positions, None, labels=marked, packed_seq_params=row).sum().backward()
    excess = {}
    for param, tensor in bridge.local_tensors():
        if not param.is_buffer:
            for name, ours in zip(param.hf, pieces_of(param, tensor.main_grad, 1), strict=True):
                bound = 3 * FP32_TOLERANCE
                if dtype is torch.bfloat16:
                    bound = PEER_RATIO * _error(peer.gradients[name], exact.gradients[name])
                excess[name] = _error(ours, exact.gradients[name]) / bound
    worst = max(excess, key=excess.__getitem__)
    assert excess[worst] < 1, f"{worst}: {excess[worst]:.2f} of what is allowed"


def test_load_and_export_give_back_every_bit_through_transformer_engine(
    groups, reference, tmp_path
):
    bridge = _bridge(reference, tmp_path, groups, torch.bfloat16)
    original, back = hf_reference.read(tmp_path), dict(bridge.export(dtype=torch.bfloat16))
    assert back.keys() == original.keys()
    assert not [
        n for n, t in original.items() if not torch.equal(t, back[n]) or t.dtype != back[n].dtype
    ]


def test_bias_and_counters_stay_fp32_in_bf16_training(groups, reference, tmp_path):
    bridge = _bridge(reference, tmp_path, groups, torch.bfloat16)
    wrap(bridge.chunks, bridge.chunks[0].config)
    found = routers(bridge.chunks)
    assert found
    for router in found:
        assert router.expert_bias.dtype is torch.float32
        assert router.local_tokens_per_expert.dtype is torch.float32

"""The same model with Transformer Engine's modules on a GPU, against transformers in fp32.

`make test-gpu` runs all `gpu` tests in one process: starting takes most of a minute.
"""

from pathlib import Path

import hf_reference
import pytest
import torch
from hf_reference import REAL_HEADS, Reference
from outcomes import Outcome, in_bf16, of_ours, of_transformers, relative_error
from torch import Tensor

from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.config.kernels import KernelsSection
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.config.sections import ExpertsSection
from megatron_dsv3.convert.bridge import Bridge
from megatron_dsv3.convert.hf_io import HFReader
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


def _bridge(
    reference: Reference,
    directory: Path,
    groups: Groups,
    dtype: torch.dtype,
    kernels: KernelsSection = KernelsSection(),
) -> Bridge:
    reference.save(directory, dtype=dtype)
    arch = Architecture.from_hf(directory)
    experts = ExpertsSection(aux_loss_coefficient=0.0)
    config = mcore_config(
        arch, Parallel(), dtype=dtype, device=groups.device, experts=experts, kernels=kernels
    )
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


@pytest.fixture(scope="module")
def exact(reference, tokens) -> Outcome:
    """transformers in fp32 on the CPU."""
    return of_transformers(reference, tokens)


@pytest.fixture(scope="module")
def peer(reference, tokens) -> Outcome:
    """transformers in bf16 on the GPU."""
    return of_transformers(in_bf16(reference, "cuda"), tokens.cuda())


KERNELS = {
    "default": KernelsSection(),
    "no fused rope": KernelsSection(fused_rope=False),
    "packed attention": KernelsSection(dense_single_documents=False),
    "fused loss": KernelsSection(fused_loss=True),
    "router in torch": KernelsSection(fused_router=False),
    "compiled swiglu": KernelsSection(fused_swiglu=False),
}


@pytest.fixture(scope="module")
def row(tokens) -> Tensor:
    """One document."""
    return tokens[:1]


@pytest.fixture(scope="module")
def exact_row(reference, row) -> Outcome:
    """transformers in fp32 on the CPU."""
    return of_transformers(reference, row)


@pytest.fixture(scope="module")
def peer_row(reference, row) -> Outcome:
    """transformers in bf16 on the GPU."""
    return of_transformers(in_bf16(reference, "cuda"), row.cuda())


@pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS.keys())
def test_each_kernel_is_as_near_to_transformers_as_its_own_bf16(
    groups, reference, row, exact_row, peer_row, tmp_path, kernels
):
    bridge = _bridge(reference, tmp_path, groups, torch.bfloat16, kernels)
    _assert_near(of_ours(bridge, row, row=_packed(1, groups.device)), exact_row, peer_row)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_logits_and_gradients_are_those_of_transformers(
    groups, reference, tokens, exact, peer, tmp_path, dtype, packed
):
    if packed and dtype is torch.float32:
        pytest.skip("cuDNN has no fp32 attention, and unfused attention no packed rows")
    bridge = _bridge(reference, tmp_path, groups, dtype)
    ours = of_ours(bridge, tokens, row=_packed(2, groups.device) if packed else None)
    _assert_near(ours, exact, peer if dtype is torch.bfloat16 else None)


def _assert_near(ours: Outcome, exact: Outcome, peer: Outcome | None) -> None:
    """Logits and every gradient; within what `peer` is off by, or in fp32."""
    for depth, logits in enumerate(exact.logits):
        bound = FP32_TOLERANCE
        if peer is not None:
            bound = PEER_RATIO * relative_error(peer.logits[depth], logits)
        assert relative_error(ours.logits[depth], logits) < bound
    assert ours.moved == exact.moved
    excess = {}
    for name in exact.moved:
        bound = 3 * FP32_TOLERANCE
        if peer is not None:
            bound = PEER_RATIO * relative_error(peer.gradients[name], exact.gradients[name])
        excess[name] = relative_error(ours.gradients[name], exact.gradients[name]) / bound
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

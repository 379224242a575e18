"""FP8 training on a GPU: the error that its roundings cost, weights kept in FP8, masters exact."""

from pathlib import Path

import hf_reference
import pytest
import torch
from fp8_peer import linears_in_fp8
from hf_reference import REAL_HEADS, Reference
from outcomes import Outcome, in_bf16, of_ours, of_transformers, relative_error
from torch import Tensor

from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.config.sections import ExpertsSection, OptimizerSection, PrecisionSection
from megatron_dsv3.convert.bridge import Bridge
from megatron_dsv3.convert.hf_io import HFReader
from megatron_dsv3.model.build import build_chunks, routers, wrap
from megatron_dsv3.model.config import mcore_config
from megatron_dsv3.model.groups import Groups
from megatron_dsv3.train.optimizer import build_optimizer

pytestmark = pytest.mark.gpu

LENGTH = 128
# Of the error that the same roundings cost transformers' model (fp8_peer.py).
PEER_RATIO = 1.5


@pytest.fixture(scope="module")
def reference() -> Reference:
    """Wide enough for FP8's blocks; its rounding is not magnified (bf16: 2%, FP8: 20%)."""
    return hf_reference.build(weight_std=0.04, bias_std=100.0, **REAL_HEADS)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 128, (2, LENGTH), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def hf_dir(reference, tmp_path_factory) -> Path:
    return reference.save(tmp_path_factory.mktemp("hf"), dtype=torch.bfloat16)


def _bridge(hf_dir: Path, groups: Groups, precision: PrecisionSection) -> Bridge:
    arch = Architecture.from_hf(hf_dir)
    config = mcore_config(
        arch,
        Parallel(),
        dtype=torch.bfloat16,
        device=groups.device,
        experts=ExpertsSection(aux_loss_coefficient=0.0),
        precision=precision,
    )
    chunks = build_chunks(
        arch, Parallel(), groups, config, max_seq_length=LENGTH, transformer_engine=True
    )
    bridge = Bridge(chunks, arch, Parallel(), groups)
    bridge.load(HFReader(hf_dir))
    return bridge


@pytest.fixture(scope="module")
def exact(reference, tokens) -> Outcome:
    """transformers in fp32 on the CPU."""
    return of_transformers(reference, tokens)


@pytest.fixture(scope="module")
def peers(reference, tokens) -> dict[str, Outcome]:
    """transformers in bf16 on the GPU, with the linear layers in FP8 by each recipe, or not."""
    half, on_gpu = in_bf16(reference, "cuda"), tokens.cuda()
    outcomes = {"off": of_transformers(half, on_gpu)}
    for recipe in ("blockwise", "tensorwise"):
        with linears_in_fp8(recipe, spared=half.model.lm_head.weight):
            outcomes[recipe] = of_transformers(half, on_gpu)
    return outcomes


def _errors(outcome: Outcome, exact: Outcome) -> dict[str, float]:
    """Of logits, of every matrix's gradient, and of all gradients as one."""
    pairs = {f"logits {i}": (outcome.logits[i], wanted) for i, wanted in enumerate(exact.logits)}
    pairs["all gradients"] = (outcome.gradient, exact.gradient)
    # A norm's weight has few elements: its error is no mean of many.
    matrices = {name for name in exact.moved if exact.gradients[name].dim() > 1}
    pairs |= {name: (outcome.gradients[name], exact.gradients[name]) for name in matrices}
    return {name: relative_error(ours, theirs) for name, (ours, theirs) in pairs.items()}


@pytest.mark.parametrize(
    "precision",
    [
        PrecisionSection(fp8="blockwise"),
        PrecisionSection(fp8="tensorwise"),
        PrecisionSection(fp8="blockwise", fp8_params=True),
    ],
    ids=["blockwise", "tensorwise", "blockwise params"],
)
def test_fp8_costs_what_its_roundings_cost_transformers(
    groups, hf_dir, tokens, exact, peers, precision
):
    """Logits and gradients are as far from fp32 as with torch's own float8, no more and no less."""
    errors = _errors(of_ours(_bridge(hf_dir, groups, precision), tokens), exact)
    yardstick = _errors(peers[precision.fp8], exact)
    ratios = {name: errors[name] / yardstick[name] for name in errors}
    worst, best = max(ratios, key=ratios.__getitem__), min(ratios, key=ratios.__getitem__)
    assert ratios[worst] < PEER_RATIO, f"{worst}: {errors[worst]:.3f}, peer {yardstick[worst]:.3f}"
    assert ratios[best] > 1 / PEER_RATIO, f"{best}: {errors[best]:.3f}, peer {yardstick[best]:.3f}"
    assert errors["all gradients"] > 3 * relative_error(peers["off"].gradient, exact.gradient)


def test_layers_at_the_ends_can_stay_in_bf16(groups, hf_dir, tokens, exact, peers):
    """Nearer to fp32 than with all layers in FP8, farther than in bf16."""
    precision = PrecisionSection(fp8="blockwise", bf16_first_layers=1, bf16_last_layers=1)
    ours = of_ours(_bridge(hf_dir, groups, precision), tokens)
    [error, fp8, bf16] = [
        relative_error(outcome.logits[0], exact.logits[0])
        for outcome in (ours, peers["blockwise"], peers["off"])
    ]
    assert 2 * bf16 < error < 0.9 * fp8


def test_routers_norms_embedding_and_head_stay_out_of_fp8(groups, hf_dir):
    from transformer_engine.pytorch.tensor import QuantizedTensor

    bridge = _bridge(hf_dir, groups, PrecisionSection(fp8="blockwise", fp8_params=True))
    kinds = {
        param.mcore: isinstance(tensor, QuantizedTensor) for param, tensor in bridge.local_tensors()
    }
    plain = ("embedding", "output_layer", "router", "norm")
    assert not [n for n, in_fp8 in kinds.items() if in_fp8 and any(word in n for word in plain)]
    linears = [n for n in kinds if "linear_fc" in n and "norm" not in n]
    assert linears
    assert all(kinds[name] for name in linears)


def test_masters_of_fp8_parameters_are_the_weights_of_the_files(groups, hf_dir):
    """Not what FP8 left of them, and not what the constructor had drawn."""
    bridge = _bridge(hf_dir, groups, PrecisionSection(fp8="blockwise", fp8_params=True))
    [model] = bridge.chunks
    optimizer = build_optimizer(
        OptimizerSection(), wrap([model], model.config), dtype=torch.bfloat16
    )
    masters = sum(
        float(tensor.double().sum())
        for part in optimizer.chained_optimizers
        for group in part.optimizer.param_groups
        for tensor in group["params"]
    )
    reader = HFReader(hf_dir)
    names = [n for p, _ in bridge.local_tensors() if not p.is_buffer for n in p.hf]
    wanted = sum(float(reader.read(name).double().sum()) for name in names)
    assert masters == pytest.approx(wanted, rel=1e-9)


def test_bias_and_counters_stay_fp32_in_fp8_training(groups, hf_dir):
    bridge = _bridge(hf_dir, groups, PrecisionSection(fp8="blockwise", fp8_params=True))
    wrap(bridge.chunks, bridge.chunks[0].config)
    found = routers(bridge.chunks)
    assert found
    for router in found:
        assert router.expert_bias.dtype is torch.float32
        assert router.local_tokens_per_expert.dtype is torch.float32

"""Options that save a GPU's memory: what they change in the numbers, and that they save it.

`make test-gpu` runs all `gpu` tests in one process: starting takes most of a minute.
"""

import gc
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import hf_reference
import pytest
import torch
from hf_reference import YARN
from torch import Tensor

from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.config.sections import ExpertsSection, MemorySection, OptimizerSection
from megatron_dsv3.convert.bridge import Bridge
from megatron_dsv3.convert.hf_io import HFReader
from megatron_dsv3.data.batch import Batch, make_batch
from megatron_dsv3.data.store import Sample
from megatron_dsv3.model.build import build_chunks, wrap
from megatron_dsv3.model.config import mcore_config
from megatron_dsv3.model.groups import Groups
from megatron_dsv3.train.optimizer import build_optimizer
from megatron_dsv3.train.step import TrainStep

pytestmark = pytest.mark.gpu

LENGTH, DOCUMENTS, NUM_STEPS, LR, CLIP = 1024, 8, 2, 2e-3, 0.05
MODEL = {
    "hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 256,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
    "q_lora_rank": 256, "kv_lora_rank": 128, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "max_position_embeddings": 4096,
    "rope_parameters": {**YARN, "original_max_position_embeddings": 256},
}  # fmt: skip
OFFLOAD_ALL = (
    *("attn_norm", "qkv_linear", "core_attn", "attn_proj", "mlp_norm", "expert_fc1", "moe_act"),
)
RECOMPUTE = ("core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "moe_act", "shared_experts")


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory) -> Path:
    """Its biases alone choose the experts, so that no rounding sends a token elsewhere."""
    reference = hf_reference.build(bias_std=100.0, **MODEL)
    return reference.save(tmp_path_factory.mktemp("hf"), dtype=torch.bfloat16)


@dataclass(frozen=True)
class State:
    """A copy on the host, so that it takes no room on the GPU whose use is measured."""

    tensor: Tensor
    device: str
    """Where it was."""


@dataclass(frozen=True)
class Run:
    losses: list[float]
    grad_norms: list[float]
    gradients: dict[str, Tensor]
    """Of the first step, over their norm: only fp32 buffers are what is clipped, not a copy."""
    updates: dict[str, Tensor]
    """Of the fp32 masters, by all steps together: bf16 weights would magnify a difference to the
    size of their own rounding."""
    states: dict[str, list[State]] = field(repr=False)
    """Of the optimizer after the first step: moments, and masters where it keeps them."""
    activation_bytes: int
    """Peak of a step over what was there before it."""
    held_bytes: int
    """Of weights, gradients and states, between two steps."""
    gradient_blocks: list[int]
    """Bytes of the blocks of pinned memory where gradients of states on the host arrive."""

    @property
    def num_weights(self) -> int:
        return sum(state.tensor.numel() for state in self.states["exp_avg"])


def _batches() -> list[Batch]:
    """The same every step: two micro-batches of packed documents, some of them padded."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for index in range(2 * DOCUMENTS):
        length = LENGTH - 37 * (index % 4)
        tokens = torch.randint(1, 128, (length,), generator=generator, dtype=torch.int32)
        counted = torch.rand(length, generator=generator) < 0.8
        samples.append(Sample(f"s{index}", tokens.numpy(), counted.numpy()))
    batch = partial(make_batch, seq_length=LENGTH, num_mtp=1, pad_id=0)
    return [batch(samples[:DOCUMENTS]), batch(samples[DOCUMENTS:])]


@dataclass(frozen=True)
class Engine:
    bridge: Bridge
    optimizer: Any
    step: TrainStep


def _engine(groups: Groups, hf_dir: Path, **options: Any) -> Engine:
    """`options` of the sections `optimizer` and `memory`, by their names."""
    memory = MemorySection(**{k: v for k, v in options.items() if k in MemorySection.model_fields})
    section = OptimizerSection(
        lr=LR,
        clip_grad=CLIP,
        eps=1e-5,  # of the size of a clipped gradient's elements: rounding is not magnified
        **{k: v for k, v in options.items() if k in OptimizerSection.model_fields},
    )
    arch, device = Architecture.from_hf(hf_dir), groups.device
    experts = ExpertsSection(aux_loss_coefficient=0.0)
    dtype = torch.bfloat16
    config = mcore_config(
        arch, Parallel(), dtype=dtype, device=device, experts=experts, memory=memory
    )
    chunks = build_chunks(
        arch, Parallel(), groups, config, max_seq_length=LENGTH, transformer_engine=True
    )
    bridge = Bridge(chunks, arch, Parallel(), groups)
    bridge.load(HFReader(hf_dir))
    wrapped = wrap(chunks, config, optimizer=section)
    optimizer = build_optimizer(section, wrapped, dtype=dtype)
    step = TrainStep(wrapped, optimizer, groups, mtp_loss_weight=0.3, experts=experts)
    return Engine(bridge, optimizer, step)


def train(groups: Groups, hf_dir: Path, **options: Any) -> Run:
    gc.collect()  # the model of the run before is part of a cycle
    torch.cuda.empty_cache()
    base = torch.cuda.memory_allocated()
    engine = _engine(groups, hf_dir, **options)
    bridge, optimizer, step = engine.bridge, engine.optimizer, engine.step
    named = dict(bridge.chunks[0].named_parameters())
    before = _masters(optimizer, bridge.chunks[0])
    results, gradients, states, peak, held = [], {}, {}, 0, 0
    for number in range(NUM_STEPS):
        torch.cuda.synchronize()
        before_step = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results.append(step(_batches()))
        peak = torch.cuda.max_memory_allocated() - before_step
        held = before_step - base
        if number == 0:
            gradients = _unit({n: p.main_grad.to("cpu", torch.float32) for n, p in named.items()})
            states = _states(optimizer)
    step.settle()
    updates = {n: master - before[n] for n, master in _masters(optimizer, bridge.chunks[0]).items()}
    losses, norms = [r.losses.main for r in results], [r.grad_norm for r in results]
    return Run(losses, norms, gradients, updates, states, peak, held, _gradient_blocks(optimizer))


def _gradient_blocks(optimizer: Any) -> list[int]:
    """Of the optimizer's own gradients, not of copies."""
    found = {}
    for part in optimizer.chained_optimizers:
        for gradient in getattr(part.optimizer, "cpu_copy_map_grad", {}).values():
            assert gradient.is_pinned()
            storage = gradient.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return list(found.values())


def _masters(optimizer: Any, model: torch.nn.Module) -> dict[str, Tensor]:
    """On the host; before the first step some optimizers have none: the weights, then."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for part in optimizer.chained_optimizers:
        for buffer in part.buffers:
            for parameter in buffer.param_index_map:
                started = len(part.optimizer.state) > 0
                tensors = part._get_main_param_and_optimizer_states(parameter) if started else {}
                master = tensors.get("param", parameter)
                found[names[id(parameter)]] = master.detach().to("cpu", torch.float32).view(-1)
    return {name: master.clone() for name, master in found.items()}


def _unit(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    norm = sum(float(tensor.double().square().sum()) for tensor in tensors.values()) ** 0.5
    return {name: tensor / norm for name, tensor in tensors.items()}


def _states(optimizer: Any) -> dict[str, list[State]]:
    found: dict[str, list[State]] = {}
    for part in optimizer.chained_optimizers:
        for state in part.optimizer.state.values():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.dim():
                    copy = value.detach().to("cpu", copy=True)
                    found.setdefault(name, []).append(State(copy, value.device.type))
    return found


@pytest.fixture(scope="module")
def run(groups, hf_dir):
    """Trains with these options; each once."""
    done: dict[str, Run] = {}

    def cached(**options: Any) -> Run:
        key = repr(options)
        if key not in done:
            done[key] = train(groups, hf_dir, **options)
        return done[key]

    return cached


def _relative(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Of all together: a single norm's weights move by less than bf16 can hold."""
    assert ours.keys() == theirs.keys()
    apart = sum(float((ours[name] - theirs[name]).square().sum()) for name in theirs)
    return (apart / sum(float(tensor.square().sum()) for tensor in theirs.values())) ** 0.5


NO_NUMBERS = {
    "the same again": {"recompute": "none"},
    "full recompute": {"recompute": "full"},
    "selective recompute": {"recompute": "selective"},
    **{
        f"{name} computed again": {"recompute": "selective", "recompute_modules": (name,)}
        for name in RECOMPUTE
    },
    "all computed again": {"recompute": "selective", "recompute_modules": RECOMPUTE},
    "activations offloaded": {"offload_activations": OFFLOAD_ALL},
    "core attention offloaded": {"offload_activations": ("core_attn", "attn_proj")},
    "offloaded and computed again": {
        "offload_activations": ("core_attn", "attn_proj", "expert_fc1"),
        "recompute": "selective",
        "recompute_modules": ("mla_up_proj", "layernorm", "moe_act"),
    },
    "overlapped": {"overlap_grad_reduce": True, "overlap_param_gather": True},
}


@pytest.mark.parametrize("options", NO_NUMBERS.values(), ids=NO_NUMBERS.keys())
def test_an_option_changes_no_number_beyond_the_order_of_sums(run, options):
    """Backward of attention and of the dispatcher adds in no fixed order on a GPU."""
    ours, plain = run(**options), run()
    assert ours.losses[0] == pytest.approx(plain.losses[0], rel=1e-6)
    assert ours.losses == pytest.approx(plain.losses, rel=1e-3)
    assert ours.grad_norms == pytest.approx(plain.grad_norms, rel=1e-2)
    assert _relative(ours.gradients, plain.gradients) < 5e-3
    assert _relative(ours.updates, plain.updates) < 0.1


def test_the_host_waits_for_the_device_only_between_gradients_and_update(groups, hf_dir):
    """For the norm of the gradients, and for all else that it wants to know, with the losses.

    What waits in an expert layer is an event, of which nothing is said here.
    """
    step = _engine(groups, hf_dir).step
    step(_batches())
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(_batches())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno}" for w in caught if "synchronizing" in str(w.message)]
    assert 1 <= len(waits) <= 2, waits


def test_training_trains(run):
    losses = run().losses
    assert losses[-1] < 0.98 * losses[0]


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"recompute": "full"}, 0.7),
        ({"recompute": "selective"}, 0.97),
        ({"offload_activations": OFFLOAD_ALL}, 0.95),
    ],
    ids=str,
)
def test_what_is_computed_again_or_offloaded_frees_memory(run, options, left):
    assert run(**options).activation_bytes < left * run().activation_bytes


def _optimized(optimizer: Any) -> list[Tensor]:
    """What Adam updates, fp32, in the order of the optimizer's groups."""
    parts = (part.optimizer for part in optimizer.chained_optimizers)
    return [tensor for part in parts for group in part.param_groups for tensor in group["params"]]


def test_the_update_of_the_masters_is_that_of_torchs_adamw(groups, hf_dir):
    """The first step's gradients are read back from the first moment that they became."""
    engine = _engine(groups, hf_dir)
    masters = _optimized(engine.optimizer)
    ours = [torch.nn.Parameter(master.detach().clone()) for master in masters]
    adamw = torch.optim.AdamW(ours, lr=LR, betas=(0.9, 0.999), eps=1e-5, weight_decay=0.0)
    before = {}
    for number in range(NUM_STEPS):
        engine.step(_batches())
        for part in engine.optimizer.chained_optimizers:
            for master, state in part.optimizer.state.items():
                at = next(i for i, other in enumerate(masters) if other is master)
                moment = state["exp_avg"].clone()
                ours[at].grad = (moment - 0.9 * before.get(at, 0.0)) / (1 - 0.9)
                before[at] = moment
        assert len(before) == len(ours), f"step {number}: every master has moments"
        adamw.step()
    for theirs, mine in zip(masters, ours, strict=True):
        torch.testing.assert_close(theirs.detach(), mine.detach(), rtol=1e-5, atol=1e-5 * LR)


STATES: dict[str, dict[str, Any]] = {
    "fp32 moments": {},
    "bf16 moments": {"moments": "bf16"},
    "offloaded": {"offload_fraction": 1.0},
    "half offloaded": {"offload_fraction": 0.5},
    "bf16 gradients": {"gradients": "bf16"},
    "bf16 moments and gradients": {"moments": "bf16", "gradients": "bf16"},
}


@pytest.mark.parametrize("options", STATES.values(), ids=STATES.keys())
def test_the_first_moment_is_that_of_the_clipped_gradient(run, options):
    """Adam's update hardly depends on the gradient's length: a lost clip would show only here."""
    result = run(**options)
    assert result.grad_norms[0] > 2 * CLIP
    squares = (float(kept.tensor.double().square().sum()) for kept in result.states["exp_avg"])
    assert sum(squares) ** 0.5 == pytest.approx((1 - 0.9) * CLIP, rel=1e-2)


@pytest.mark.parametrize("options", [v for v in STATES.values() if v], ids=list(STATES)[1:])
def test_where_states_are_kept_changes_numbers_by_rounding_alone(run, options):
    ours, plain = run(**options), run()
    assert ours.losses[0] == pytest.approx(plain.losses[0], rel=1e-6)
    assert ours.losses == pytest.approx(plain.losses, rel=5e-3)
    gradient_bound, update_bound = (2e-2, 0.3) if "gradients" in options else (5e-3, 0.15)
    assert _relative(ours.gradients, plain.gradients) < gradient_bound
    assert _relative(ours.updates, plain.updates) < update_bound


def test_bf16_moments_are_bf16_and_take_half_the_memory(run):
    ours, plain = run(moments="bf16"), run()
    kept = [*ours.states["exp_avg"], *ours.states["exp_avg_sq"]]
    assert {state.tensor.dtype for state in kept} == {torch.bfloat16}
    saved = (plain.held_bytes - ours.held_bytes) / plain.num_weights
    assert saved > 3.5, f"{saved:.1f} bytes a parameter"


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_offloaded_states_are_in_host_memory_and_free_twelve_bytes_a_parameter(run, fraction):
    ours, plain = run(offload_fraction=fraction), run()
    for name in ("exp_avg", "exp_avg_sq", "master_param"):
        kept = ours.states[name]
        on_host = sum(state.tensor.numel() for state in kept if state.device == "cpu")
        assert on_host / ours.num_weights == pytest.approx(fraction, abs=0.1), name
        assert {state.tensor.dtype for state in kept} == {torch.float32}
    saved = (plain.held_bytes - ours.held_bytes) / plain.num_weights
    assert saved > 0.95 * 12 * fraction, f"{saved:.1f} bytes a parameter"
    # Gradients come down in fp32, many in one block: torch takes a power of two for each.
    pinned = sum(1 << (size - 1).bit_length() for size in ours.gradient_blocks)
    share = pinned / plain.num_weights
    assert 0.9 * 4 * fraction < share < 1.1 * 4 * fraction, f"{share:.1f} bytes a parameter"


def test_gradients_in_bf16_are_there_twice_in_the_update_alone(run):
    """Megatron-Core's hybrid optimizer copies those of what stays on the GPU to fp32."""
    ours, plain = (run(offload_fraction=0.5, gradients=gradients) for gradients in ("bf16", "fp32"))
    saved = (plain.held_bytes - ours.held_bytes) / plain.num_weights
    assert saved > 1.8, f"{saved:.1f} bytes a parameter"


def test_gradients_in_bf16_free_two_bytes_a_parameter_with_bf16_moments(run):
    """With fp32 moments the optimizer first copies its share of the gradients to fp32."""
    ours, plain = run(moments="bf16", gradients="bf16"), run(moments="bf16")
    assert (plain.held_bytes - ours.held_bytes) / plain.num_weights > 1.8

"""What the modules of a layer hold for backward and take while they run, measured on one GPU.

    python benchmarks/te_saved_tensors.py --json FILE [--tokens 4096]

Takes the modules out of the model that training builds (a dense and an expert layer of DeepSeek-V3,
8 experts), after a step, so that caches are filled. Each runs alone on tensors of its own:

    extra      bytes held after forward, beyond inputs and outputs that the caller still has
    input      bytes of the inputs that stay when the caller lets go of them
    output     the same of the outputs
    forward    most bytes in forward, above the inputs
    backward   most bytes in backward, above what was held before it; gradients of inputs included

The planner's table (`megatron_dsv3/plan/saved_tensors.yaml`) is checked against the file.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl, weighted_bias_swiglu_impl
from megatron.core.transformer.moe import moe_utils
from torch import Tensor

from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.config.sections import OptimizerSection, PrecisionSection
from megatron_dsv3.model.build import unwrap
from megatron_dsv3.model.groups import device_of, start, stop
from megatron_dsv3.train import bench
from megatron_dsv3.train.step import to_row

PRECISIONS = {
    "bf16": PrecisionSection(),
    "blockwise": PrecisionSection(fp8="blockwise"),
    "tensorwise": PrecisionSection(fp8="tensorwise"),
}
ARCH = bench.slice_of_v3(num_layers=2)
Call = Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Bytes of one call; the module's opening says what is what."""

    module: str
    precision: str
    tokens: int
    inputs: list[list[int]]
    input_bytes: int
    output_bytes: int
    extra: int
    input: int
    output: int
    forward: int
    backward: int
    saved: list[str]
    """Type and shape of what autograd was given, without parameters."""


def main() -> None:
    """Measures every module in every precision and writes one file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    arguments = parser.parse_args()
    groups = start(Parallel(), device_of("cuda"))
    about = {"torch": torch.__version__, "device": torch.cuda.get_device_name()}
    rows: list[dict[str, Any]] = []
    for precision in PRECISIONS:
        rows += [asdict(held) for held in _precision(precision, arguments.tokens, groups)]
        bench.release()
        arguments.json.write_text(json.dumps({"about": about, "modules": rows}, indent=1) + "\n")
    stop()


def _precision(precision: str, tokens: int, groups: Any) -> list[Held]:
    case = bench.Case(
        name=precision,
        arch=ARCH,
        document_length=tokens,
        precision=PRECISIONS[precision],
        optimizer=OptimizerSection(moments="bf16"),
    )
    prepared = bench.prepare(case, groups)
    held = []
    try:
        prepared.one()
        model = unwrap(prepared.step.chunks[0])
        packed = to_row(prepared.batches[0], groups).packed
        for name, (call, shapes) in _calls(model, packed, tokens).items():
            try:
                found = _measure(call, shapes, model.config)
            except Exception as error:  # one module that fails must not cost the others
                print(f"{precision:26} {tokens:6} {name:22} failed: {error}"[:200], flush=True)
                continue
            held.append(Held(module=name, precision=precision, tokens=tokens, **found))
            sizes = " ".join(f"{key} {found[key] / 2**20:.2f}" for key in _SIZES)
            print(f"{precision:26} {tokens:6} {name:22} MiB {sizes}", flush=True)
    finally:
        bench.free(prepared.step.chunks, prepared.step.optimizer)
    return held


_SIZES = ("input_bytes", "output_bytes", "extra", "input", "output", "forward", "backward")


def _calls(model: Any, packed: Any, tokens: int) -> dict[str, tuple[Call, list[tuple[int, ...]]]]:
    """Every module with the shapes of its inputs."""
    dense, sparse = model.decoder.layers
    attention, experts, shared = dense.self_attention, sparse.mlp.experts, sparse.mlp.shared_experts
    arch, sent = ARCH, tokens * ARCH.num_experts_per_token
    hidden = (tokens, 1, arch.hidden_size)
    splits = torch.full((arch.num_experts,), tokens, dtype=torch.int64).tolist()
    heads = (tokens, arch.num_heads)
    keys = (*heads, arch.qk_head_dim + arch.qk_rope_head_dim)
    routing = torch.ones(tokens, arch.num_experts, dtype=torch.bool, device="cuda")
    shape = (tokens, arch.hidden_size)
    *_, order, _, _ = _permute(torch.zeros(shape, device="cuda", dtype=torch.bfloat16), routing)
    wide, narrow = 2 * arch.moe_ffn_hidden_size, arch.moe_ffn_hidden_size
    labels = torch.zeros(tokens, 1, dtype=torch.int64, device="cuda")

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention.core_attention(
            query,
            key,
            value,
            None,
            packed_seq_params=packed,
            attn_mask_type=attention.attn_mask_type,
        )

    def weigh(x: Tensor) -> Tensor:
        probs = torch.ones(len(x), 1, device="cuda", requires_grad=True)
        return weighted_bias_swiglu_impl(x, None, probs)

    def restore(x: Tensor) -> Tensor:
        return moe_utils.unpermute(x, order, torch.Size(shape), routing_map=routing, fused=True)

    def cross_entropy(logits: Tensor) -> Tensor:
        # It writes into the logits that it gets, which are the output layer's own.
        return tensor_parallel.vocab_parallel_cross_entropy(logits, labels)

    return {
        "input_layernorm": (dense.input_layernorm, [hidden]),
        "linear_q_down_proj": (attention.linear_q_down_proj, [hidden]),
        "linear_q_up_proj": (attention.linear_q_up_proj, [(tokens, arch.q_lora_rank or 0)]),
        "linear_kv_down_proj": (attention.linear_kv_down_proj, [hidden]),
        "linear_kv_up_proj": (attention.linear_kv_up_proj, [(tokens, arch.kv_lora_rank)]),
        "core_attention": (attend, [keys, keys, (*heads, arch.v_head_dim)]),
        "linear_proj": (attention.linear_proj, [(tokens, 1, arch.num_heads * arch.v_head_dim)]),
        "self_attention": (
            lambda x: attention(x, attention_mask=None, packed_seq_params=packed), [hidden]
        ),
        "dense linear_fc1": (dense.mlp.linear_fc1, [hidden]),
        "dense linear_fc2": (dense.mlp.linear_fc2, [(tokens, 1, arch.ffn_hidden_size)]),
        "shared linear_fc1": (shared.linear_fc1, [hidden]),
        "shared linear_fc2": (shared.linear_fc2, [(tokens, 1, narrow)]),
        "shared_experts": (shared, [hidden]),
        "experts linear_fc1": (lambda x: experts.linear_fc1(x, splits), [(sent, arch.hidden_size)]),
        "experts linear_fc2": (lambda x: experts.linear_fc2(x, splits), [(sent, narrow)]),
        "router": (lambda x: sparse.mlp.router(x, None)[0], [hidden]),
        "permute": (lambda x: _permute(x, routing)[0], [shape]),
        "unpermute": (restore, [(sent, arch.hidden_size)]),
        "swiglu": (lambda x: bias_swiglu_impl(x, None), [(tokens, 1, 2 * arch.ffn_hidden_size)]),
        "weighted swiglu": (weigh, [(sent, wide)]),
        "expert layer": (sparse.mlp, [hidden]),
        "output_layer": (model.output_layer, [hidden]),
        "cross_entropy": (cross_entropy, [(tokens, 1, arch.vocab_size)]),
        "layer with dense MLP": (
            lambda x: dense(x, attention_mask=None, packed_seq_params=packed), [hidden]
        ),
        "layer with experts": (
            lambda x: sparse(x, attention_mask=None, packed_seq_params=packed), [hidden]
        ),
    }  # fmt: skip


def _permute(x: Tensor, routing: Tensor) -> Any:
    return moe_utils.permute(
        x,
        routing,
        probs=torch.ones(routing.shape, device="cuda", requires_grad=True),
        num_out_tokens=routing.numel(),
        fused=True,
    )


def _measure(call: Call, shapes: Sequence[tuple[int, ...]], config: Any) -> dict[str, Any]:
    leaves = [
        torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for shape in shapes
    ]
    with get_fp8_context(config):
        for _ in range(2):  # caches and compiled kernels
            for output in _tensors(call(*[leaf.clone() for leaf in leaves])):
                if output.requires_grad:
                    output.backward(torch.ones_like(output))
                    break
        saved = _saved(call, leaves)
        return _sizes(call, leaves) | {"saved": saved, "inputs": [list(s) for s in shapes]}


def _sizes(call: Call, leaves: Sequence[Tensor]) -> dict[str, int]:
    for leaf in leaves:
        leaf.grad = None
    started = _allocated()
    inputs = [leaf.clone() for leaf in leaves]
    input_bytes = _allocated() - started
    torch.cuda.reset_peak_memory_stats()
    outputs = _tensors(call(*inputs))
    forward = torch.cuda.max_memory_allocated() - started - input_bytes
    after = _allocated()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in outputs}
    own = {t.untyped_storage().data_ptr() for t in inputs}
    output_bytes = sum(size for pointer, size in storages.items() if pointer not in own)
    del inputs
    input_kept = input_bytes - (after - _allocated())
    # Autograd's graph stays with the node; a tensor without storage of its own keeps nothing else.
    node = torch.autograd.graph.get_gradient_edge(outputs[0])
    gradient = torch.ones_like(outputs[0])
    with_gradient = _allocated()
    del outputs
    output_kept = output_bytes - (with_gradient - _allocated())
    before = _allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.backward(node, gradient)
    torch.cuda.synchronize()
    return {
        "input_bytes": input_bytes,
        "output_bytes": output_bytes,
        "extra": after - started - input_bytes - output_bytes,
        "input": input_kept,
        "output": output_kept,
        "forward": forward,
        "backward": torch.cuda.max_memory_allocated() - before,
    }


def _saved(call: Call, leaves: Sequence[Tensor]) -> list[str]:
    found: list[str] = []

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kind = str(tensor.dtype).removeprefix("torch.")
            found.append(f"{kind} {list(tensor.shape)}")
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(*[leaf.clone() for leaf in leaves])
    return found


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [item for item in result if isinstance(item, Tensor)]


def _allocated() -> int:
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


if __name__ == "__main__":
    main()

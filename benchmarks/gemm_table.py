"""How long the kernels of a layer take on this GPU, by shape: the planner's table.

    python benchmarks/gemm_table.py --yaml megatron_dsv3/plan/kernels.yaml [--only attention]

Products of DeepSeek-V3's widths through Transformer Engine's modules in bf16 and FP8 blocks, whole
and cut by tensor parallelism; grouped products of experts; packed causal attention; copies; Adam.
The host queues all repeats behind a sleeping kernel, so that times are those of the device. About
a minute.
"""

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dsv3.config.architecture import DEEPSEEK_V3, Architecture
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.config.sections import PrecisionSection
from megatron_dsv3.model.config import mcore_config
from megatron_dsv3.model.groups import device_of, start, stop

REPEATS = 5
WARM_UP = 3
"""Calls before: kernels are chosen and loaded in the first ones, and memory is found."""
SLEEP_CYCLES = 60_000_000
"""About 30 ms: longer than the host takes to queue the repeats."""
TOKENS = (1024, 4096, 16384)
PER_EXPERT = (128, 512, 2048, 4096, 16384)
EXPERTS = (4, 8)
DOCUMENTS = (1024, 4096, 16384, 32768)
HEADS = (16, 64, 128)
PRECISIONS = {"bf16": PrecisionSection(), "blockwise": PrecisionSection(fp8="blockwise")}
Row = dict[str, Any]


def widths(arch: Architecture) -> list[tuple[int, int]]:
    """(n, k) of the products of a layer, also as 2 and 8 tensor-parallel ranks cut them."""
    num_heads, hidden = arch.num_heads, arch.hidden_size
    rank, kv_rank = arch.q_lora_rank or hidden, arch.kv_lora_rank
    q_width = num_heads * (arch.qk_head_dim + arch.qk_rope_head_dim)
    found = [(rank, hidden), (kv_rank + arch.qk_rope_head_dim, hidden)]
    for tp in (1, 2, 8):
        found += [
            (q_width // tp, rank),
            (num_heads * (arch.qk_head_dim + arch.v_head_dim) // tp, kv_rank),
            (hidden, num_heads * arch.v_head_dim // tp),
            (2 * arch.ffn_hidden_size // tp, hidden),
            (hidden, arch.ffn_hidden_size // tp),
            (2 * arch.moe_ffn_hidden_size // tp, hidden),
            (hidden, arch.moe_ffn_hidden_size // tp),
        ]
    return list(dict.fromkeys(found))


def linears(precision: str, context: Callable[[], Any]) -> Iterator[Row]:
    """Every product of `widths` for some numbers of tokens."""
    import transformer_engine.pytorch as te

    for n, k in widths(DEEPSEEK_V3):
        layer = te.Linear(
            k, n, bias=False, params_dtype=torch.bfloat16, fuse_wgrad_accumulation=True,
            device="cuda",
        )  # fmt: skip
        _prepare(layer)
        for tokens in TOKENS:
            yield _product("linear", precision, layer, (tokens, n, k, 1), context)


def experts(precision: str, context: Callable[[], Any]) -> Iterator[Row]:
    """The two products of 4 and 8 experts of equal load."""
    import transformer_engine.pytorch as te

    hidden, width = DEEPSEEK_V3.hidden_size, DEEPSEEK_V3.moe_ffn_hidden_size
    for groups in EXPERTS:
        for n, k in ((2 * width, hidden), (hidden, width)):
            layer = te.GroupedLinear(
                groups, k, n, bias=False, params_dtype=torch.bfloat16,
                fuse_wgrad_accumulation=True, device="cuda",
            )  # fmt: skip
            _prepare(layer)
            for tokens in PER_EXPERT:
                yield _product("grouped", precision, layer, (tokens, n, k, groups), context)


def head(_: str, __: Callable[[], Any]) -> Iterator[Row]:
    """Head and loss are bf16 in any precision: cut by 8 ranks and whole."""
    hidden = DEEPSEEK_V3.hidden_size
    for n in (DEEPSEEK_V3.vocab_size // 8, DEEPSEEK_V3.vocab_size):
        weight = torch.randn(n, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        x = torch.randn(4096, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        times = _timed(lambda x=x, weight=weight: torch.nn.functional.linear(x, weight), [x])
        yield {
            "kind": "linear", "precision": "bf16", "tokens": 4096, "n": n, "k": hidden, "groups": 1,
        } | times  # fmt: skip


def attention(_: str, __: Callable[[], Any]) -> Iterator[Row]:
    """Packed documents of one length, causal, keys of 192 and values of 128."""
    import transformer_engine.pytorch as te

    arch = DEEPSEEK_V3
    widths_of_head = (arch.qk_head_dim + arch.qk_rope_head_dim, arch.v_head_dim)
    for num_heads in HEADS:
        core = te.DotProductAttention(
            num_heads, widths_of_head, attention_dropout=0.0, qkv_format="thd",
            attn_mask_type="padding_causal",
        )  # fmt: skip
        for length in DOCUMENTS:
            rows = max(16384, length)
            ends = torch.arange(0, rows + 1, length, device="cuda", dtype=torch.int32)
            inputs = [
                torch.randn(
                    rows, num_heads, width, device="cuda", dtype=torch.bfloat16, requires_grad=True
                )
                for width in (widths_of_head[0], *widths_of_head)
            ]
            times = _timed(
                lambda core=core, inputs=inputs, ends=ends, length=length: core(
                    *inputs, cu_seqlens_q=ends, cu_seqlens_kv=ends,
                    max_seqlen_q=length, max_seqlen_kv=length,
                ),
                inputs,
            )  # fmt: skip
            yield {
                "kind": "attention", "precision": "bf16", "tokens": rows, "length": length,
                "heads": num_heads,
            } | times  # fmt: skip


def memory(_: str, __: Callable[[], Any]) -> Iterator[Row]:
    """A copy of 2 GiB; and Adam of 2^28 parameters, fp32 moments and bf16."""
    from transformer_engine.pytorch.optimizers import FusedAdam

    yield _copy()
    for moments in (torch.float32, torch.bfloat16):
        masters = torch.zeros(2**28, device="cuda", requires_grad=True)
        masters.grad = torch.ones_like(masters)
        optimizer = FusedAdam([masters], exp_avg_dtype=moments, exp_avg_sq_dtype=moments)
        seconds = _queued(optimizer.step)
        yield {
            "kind": "adam", "precision": "fp32" if moments is torch.float32 else "bf16",
            "parameters": masters.numel(), "forward_us": round(seconds * 1e6, 1),
        }  # fmt: skip


def _copy() -> Row:
    source = torch.zeros(2**30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    seconds = _queued(lambda: target.copy_(source))
    return {"kind": "copy", "bytes": 4 * source.numel(), "forward_us": round(seconds * 1e6, 1)}


KINDS: dict[str, Callable[[str, Callable[[], Any]], Iterator[Row]]] = {
    "linear": linears, "grouped": experts, "head": head, "attention": attention, "memory": memory,
}  # fmt: skip
IN_EVERY_PRECISION = ("linear", "grouped")


def main() -> None:
    """Measures all kinds and writes the table, one row a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--yaml", type=Path, required=True)
    parser.add_argument("--card", default="h100-80gb", help="its name in plan/cards.yaml")
    parser.add_argument("--only", nargs="*", choices=list(KINDS), default=list(KINDS))
    arguments = parser.parse_args()
    # As training asks for it: the fall-back to unfused attention would be another kernel.
    os.environ |= {"NVTE_FUSED_ATTN": "1", "NVTE_FLASH_ATTN": "0", "NVTE_UNFUSED_ATTN": "0"}
    began = time.perf_counter()
    start(Parallel(), device_of("cuda"))
    rows = [row for kind in arguments.only for row in _of_kind(kind)]
    _write(arguments.yaml, rows, arguments.card)
    print(f"{len(rows)} rows in {time.perf_counter() - began:.0f} s -> {arguments.yaml}")
    stop()


def _of_kind(kind: str) -> list[Row]:
    rows: list[Row] = []
    for precision in PRECISIONS if kind in IN_EVERY_PRECISION else ["bf16"]:
        try:
            for row in KINDS[kind](precision, _context(precision)):
                print(row, flush=True)
                rows.append(row)
        except Exception as error:  # a kind that fails must not cost the others
            print(f"{kind} in {precision} failed: {error}", flush=True)
        torch.cuda.empty_cache()
    return rows


def _context(precision: str) -> Callable[[], Any]:
    if precision == "bf16":
        return contextlib.nullcontext
    from megatron.core.fp8_utils import get_fp8_context

    config = mcore_config(
        DEEPSEEK_V3, Parallel(), dtype=torch.bfloat16, device=torch.device("cuda"),
        precision=PRECISIONS[precision],
    )  # fmt: skip
    return lambda: get_fp8_context(config)


def _prepare(layer: torch.nn.Module) -> None:
    """Gradients of weights are added up in fp32 by the product itself, as in training."""
    for weight in layer.parameters():
        weight.main_grad = torch.zeros(weight.shape, device="cuda")
        weight.grad_added_to_main_grad = False


def _product(
    kind: str,
    precision: str,
    layer: Any,
    shape: tuple[int, int, int, int],
    context: Callable[[], Any],
) -> Row:
    tokens, n, k, groups = shape
    x = torch.randn(tokens * groups, k, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    splits = ([tokens] * groups,) if kind == "grouped" else ()
    with context():
        layer(x, *splits, is_first_microbatch=True)
        # FP8 copies of the weights are made once a step, not once a micro-batch.
        times = _timed(lambda: layer(x, *splits, is_first_microbatch=False), [x])
    row = {"kind": kind, "precision": precision, "tokens": tokens, "n": n, "k": k, "groups": groups}
    return row | times


def _timed(call: Callable[[], Tensor], inputs: Sequence[Tensor]) -> Row:
    """Microseconds of forward and of backward, medians."""
    gradient = torch.ones_like(call())
    events: list[list[torch.cuda.Event]] = []

    def once() -> None:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        marks[0].record()
        output = call()
        marks[1].record()
        output.backward(gradient)
        marks[2].record()
        events.append(marks)
        for x in inputs:
            x.grad = None

    for _ in range(WARM_UP):
        once()
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP_CYCLES)
    for _ in range(REPEATS):
        once()
    torch.cuda.synchronize()
    spans = [(a.elapsed_time(b), b.elapsed_time(c)) for a, b, c in events[WARM_UP:]]
    forward, backward = (statistics.median(span) for span in zip(*spans, strict=True))
    return {"forward_us": round(forward * 1e3, 1), "backward_us": round(backward * 1e3, 1)}


def _queued(call: Callable[[], Any]) -> float:
    """Seconds of one call, without the host."""
    call()
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SLEEP_CYCLES)
    begin.record()
    for _ in range(REPEATS):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / REPEATS / 1e3


def _write(path: Path, rows: Sequence[Row], card: str) -> None:
    device = torch.cuda.get_device_name()
    lines = [
        "# Kernels measured by benchmarks/gemm_table.py; microseconds on the device. `tokens` of a",
        "# grouped product are those of one expert, of attention all of them.",
        f"card: {card}",
        f'source: "{device}, torch {torch.__version__}, benchmarks/gemm_table.py"',
        "rows:",
    ]
    lines += [
        "  - {" + ", ".join(f"{key}: {value}" for key, value in row.items()) + "}" for row in rows
    ]
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

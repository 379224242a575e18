"""Stand-ins for Transformer Engine's modules and kernels on the meta device.

They compute nothing: each makes outputs of the right shapes and holds what `saved_tensors.yaml`
says, so that the model's own forward and backward show what a GPU would allocate. All else that
runs (attention's plumbing, router, dispatcher, recomputation, loss) is the real code.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.fusions import fused_bias_swiglu
from megatron.core.tensor_parallel import layers, reduce_scatter_to_sequence_parallel_region
from megatron.core.tensor_parallel import random as mcore_random
from megatron.core.transformer.moe import moe_utils
from torch import Tensor, nn

from megatron_dsv3.model import torch_modules as torch_mods
from megatron_dsv3.model.attention import CoreAttention
from megatron_dsv3.plan.saved_tensors import Holding, holding, total

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Work:
    """One call of a module."""

    kept: Holding
    sizes: dict[str, int]
    outputs: Sequence[tuple[Shape, torch.dtype]]


class _Run(torch.autograd.Function):
    """Allocates as the module would, forward and backward."""

    @staticmethod
    def forward(ctx: Any, work: _Work, *inputs: Tensor) -> tuple[Tensor, ...]:
        working = _bytes(total(work.kept.forward, work.sizes))
        held = _bytes(total(work.kept.holds, work.sizes))
        outputs = tuple(inputs[0].new_empty(shape, dtype=dtype) for shape, dtype in work.outputs)
        del working
        ctx.work = work
        ctx.likes = [(x.shape, x.dtype, x.requires_grad) for x in inputs]
        kept_inputs = inputs if work.kept.keeps_input else ()
        kept_outputs = outputs if work.kept.keeps_output else ()
        ctx.save_for_backward(held, *kept_inputs, *kept_outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        working = _bytes(total(ctx.work.kept.backward, ctx.work.sizes))
        gradients = [
            saved[0].new_empty(shape, dtype=dtype) if wanted else None
            for shape, dtype, wanted in ctx.likes
        ]
        del working
        return (None, *gradients)


def _bytes(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device="meta")


def _run(
    kept: Holding,
    inputs: Sequence[Tensor],
    outputs: Sequence[tuple[Shape, torch.dtype]],
    sizes: dict[str, int],
) -> tuple[Tensor, ...]:
    sizes = {
        "input": sum(x.numel() for x in inputs),
        "output": sum(_numel(shape) for shape, _ in outputs),
        **sizes,
    }
    result: tuple[Tensor, ...] = _Run.apply(  # type: ignore[no-untyped-call]
        _Work(kept, sizes, outputs), *inputs
    )
    return result


def _numel(shape: Shape) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


class _Norm(torch_mods.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.size(-1)
        return _run(holding("norm", "any"), [x], [(tuple(x.shape), x.dtype)], {"row": rows})[0]


def _product(
    module: Any, x: Tensor, kind: str, *, rows: int, width: int, gathered: int = 0
) -> tuple[Tensor, None]:
    shape = (rows, *x.shape[1:-1], width)
    sizes = {"row": x.numel() // x.size(-1), "gathered": gathered}
    kept = holding(kind, module.precision)
    return _run(kept, [x], [(shape, x.dtype)], sizes)[0], None


def _column(module: Any, x: Tensor, kind: str) -> tuple[Tensor, None]:
    """Each rank gathers the others' part of the sequence and makes its part of the features."""
    share = module.tp_group.size() if module.config.sequence_parallel else 1
    gathered = x.numel() * share if share > 1 else 0
    rows, width = x.size(0) * share, module.weight.size(0)
    return _product(module, x, kind, rows=rows, width=width, gathered=gathered)


class _Column(torch_mods.ColumnLinear):
    def forward(self, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return _column(self, x, "product_of_kept_input" if self.keeps_input else "product")


class _NormColumn(torch_mods.NormColumnLinear):
    def forward(self, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return _column(self, x, "norm_product")


class _Row(torch_mods.RowLinear):
    def forward(self, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        kind = "product_of_kept_input" if self.keeps_input else "product"
        y = _product(self, x, kind, rows=x.size(0), width=self.weight.size(0))[0]
        return (_reduce_scatter(y, self.tp_group) if self.config.sequence_parallel else y), None


class _Duplicated(torch_mods.DuplicatedLinear):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        kind = "product_of_kept_input" if self.keeps_input else "product"
        return _product(self, x, kind, rows=x.size(0), width=self.weight.size(0))


class _Grouped(torch_mods.GroupedLinear):
    def forward(self, x: Tensor, splits: Sequence[int]) -> tuple[Tensor, None]:
        kind = "grouped_product_of_kept_input" if self.keeps_input else "grouped_product"
        width = self.get_parameter("weight0").size(0)
        return _product(self, x, kind, rows=sum(splits), width=width)


class _GroupedColumn(_Grouped, torch_mods.GroupedColumnLinear):
    pass


class _GroupedRow(_Grouped, torch_mods.GroupedRowLinear):
    pass


class _Attention(CoreAttention):
    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object
    ) -> Tensor:
        heads = query.shape[:-1]
        shape = (*heads[:-1], heads[-1] * value.size(-1))
        sizes = {"row": _numel(tuple(heads)), "query": query.numel()}
        kept = holding("attention", "any")
        return _run(kept, [query, key, value], [(shape, query.dtype)], sizes)[0]


def _reduce_scatter(x: Tensor, group: Any) -> Tensor:
    result: Tensor = reduce_scatter_to_sequence_parallel_region(x, group=group)
    return result


STAND_INS: dict[type[nn.Module], type[nn.Module]] = {
    torch_mods.RMSNorm: _Norm,
    torch_mods.ColumnLinear: _Column,
    torch_mods.NormColumnLinear: _NormColumn,
    torch_mods.RowLinear: _Row,
    torch_mods.DuplicatedLinear: _Duplicated,
    torch_mods.GroupedColumnLinear: _GroupedColumn,
    torch_mods.GroupedRowLinear: _GroupedRow,
    CoreAttention: _Attention,
}


def stand_in(
    model: nn.Module, precision_of: Callable[[str], str], *, keep_input: frozenset[str]
) -> None:
    """Turns the torch modules of a model into stand-ins for Transformer Engine's.

    Args:
        model: As built from plain torch modules.
        precision_of: Name of a module -> bf16, or the FP8 recipe.
        keep_input: Ends of names of modules that hold their input as it is, whatever the precision.
    """
    for name, module in model.named_modules():
        if type(module) in STAND_INS:
            module.__class__ = STAND_INS[type(module)]
            module.precision = precision_of(name)
            module.keeps_input = name.endswith(tuple(keep_input))


def is_product(module: nn.Module) -> bool:
    """Whether this is one of Transformer Engine's linears, which FP8 recipes are about."""
    return isinstance(module, _Column | _NormColumn | _Row | _Duplicated | _Grouped)


@contextmanager
def kernels() -> Iterator[None]:
    """Inside, Megatron-Core finds stand-ins where it would call fused kernels of a GPU.

    Names are put back afterwards, so that nothing outside the planner sees them.
    """
    fused = SimpleNamespace(wgrad_gemm_accum_fp32=_nothing, wgrad_gemm_accum_fp16=_nothing)
    names: list[tuple[Any, dict[str, Any]]] = [
        (moe_utils, {"HAVE_TE": True, "fused_permute": _nothing}),
        (moe_utils, {"fused_permute_and_pad_with_probs": None}),
        (moe_utils, {"fused_permute_with_probs": _permute, "fused_unpermute": _unpermute}),
        (moe_utils, {"fused_sort_chunks_by_index": _sort}),
        (moe_utils, {"fused_sort_chunks_by_index_with_probs": _sort_with_probs}),
        (layers, {"fused_weight_gradient_mlp_cuda": fused, "_grad_accum_fusion_available": True}),
        (layers, {"HAVE_TE": True, "get_dummy_wgrad": _dummy}),
        (fused_bias_swiglu, {"swiglu": _half, "weighted_swiglu": _half, "swiglu_back": _like}),
        (fused_bias_swiglu, {"weighted_swiglu_back": _likes}),
        (mcore_random, {"_share_storage_ext": SimpleNamespace(share_storage=_share_storage)}),
        # The first backward of a process sets it, to a shape that a training step's does not fit.
        (moe_utils.MoEAuxLossAutoScaler, {"main_loss_backward_scale": None}),
    ]
    with ExitStack() as stack:
        # Nothing is computed: there is nothing that compiling would make faster.
        stack.enter_context(torch._dynamo.config.patch(disable=True))
        for module, values in names:
            stack.enter_context(patch.multiple(module, create=True, **values))
        yield


def _nothing(*_: Any, **__: Any) -> None:
    """A kernel that writes into what is there."""


def _dummy(shape: Sequence[int], dtype: torch.dtype, *, zero: bool = False) -> Tensor:
    """Transformer Engine's is one for all gradients of a shape, and belongs to the states."""
    return torch.empty(1, dtype=dtype, device="meta").expand(*shape)


def _half(y: Tensor, *_: Tensor) -> Tensor:
    return y.new_empty(*y.shape[:-1], y.size(-1) // 2)


def _like(_: Tensor, y: Tensor) -> Tensor:
    return torch.empty_like(y)


def _likes(_: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y), torch.empty_like(weights)


def _permute(
    x: Tensor, probs: Tensor, routing: Tensor, *, num_out_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = [((num_out_tokens, x.size(1)), x.dtype), ((num_out_tokens,), probs.dtype)]
    sizes = {"map": routing.size(0) * (2 * routing.size(1) + 1)}
    y, permuted = _run(holding("permute", "any"), [x, probs], outputs, sizes)
    return y, permuted, _bytes(0)


def _unpermute(x: Tensor, *_: Any, restore_shape: Shape, **__: Any) -> Tensor:
    return _run(holding("unpermute", "any"), [x], [(tuple(restore_shape), x.dtype)], {})[0]


def _sort(x: Tensor, *_: Any) -> Tensor:
    kept = holding("sort", "any")
    return _run(kept, [x], [(tuple(x.shape), x.dtype)], {"map": x.size(0)})[0]


def _sort_with_probs(x: Tensor, probs: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    outputs = [(tuple(x.shape), x.dtype), (tuple(probs.shape), probs.dtype)]
    y, sorted_probs = _run(holding("sort", "any"), [x, probs], outputs, {"map": x.size(0)})
    return y, sorted_probs


def _share_storage(target: Tensor, source: Tensor) -> None:
    """The target's storage holds the source's from now on, as if they were one."""
    storage = target.untyped_storage()
    storage.planner_source = source.untyped_storage()  # type: ignore[attr-defined]

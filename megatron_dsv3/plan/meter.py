"""Memory of tensors without memory: what would be allocated, when, and by which module.

Under a `Meter` every storage that an operation makes is watched until nothing refers to it, as a
GPU's allocator would see it. Works on meta tensors, whose operations cost microseconds.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BLOCK = 512
"""Bytes that CUDA's allocator rounds up to."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One storage as it stood at some moment."""

    number: int
    """Of the storage, in order of allocation."""
    size: int
    """Bytes."""
    module: str
    """Name of the module that made it; "" outside all modules."""
    phase: str
    """What the meter's user was at when it was made."""


@dataclass(frozen=True, slots=True)
class _Watched:
    number: int
    storage: Callable[[], torch.UntypedStorage | None]
    module: str
    phase: str


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches what operations allocate inside a `with`.

    Args:
        model: Its modules' names say where an allocation comes from. Its parameters and buffers are
            not counted.
        ignored: More tensors whose storages are not counted.
    """

    def __init__(self, model: nn.Module, ignored: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase = ""
        self.peak = 0
        self.at_peak: Sequence[Piece] = ()
        """What was there at the peak."""
        self._watched: dict[int, _Watched] = {}
        self._count = 0
        self._names = {id(module): name for name, module in model.named_modules()}
        self._stack: list[str] = []
        self._own = [tensor.untyped_storage() for tensor in (*_tensors_of(model), *ignored)]
        self._ignored = {storage._cdata for storage in self._own}
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        self._hooks = [
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
        ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_meta:
                self._watch(leaf)
        self._note_peak()
        return result

    def pieces(self) -> list[Piece]:
        """What is there now."""
        found = []
        for watched in list(self._watched.values()):
            storage = watched.storage()
            if storage is not None and (size := storage.nbytes()):
                rounded = -(-size // BLOCK) * BLOCK
                found.append(Piece(watched.number, rounded, watched.module, watched.phase))
        return found

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._watched or key in self._ignored:
            return

        def forget(_: object) -> None:
            self._watched.pop(key, None)

        module = self._stack[-1] if self._stack else ""
        self._count += 1
        self._watched[key] = _Watched(self._count, weakref.ref(storage, forget), module, self.phase)

    def _note_peak(self) -> None:
        pieces = self.pieces()
        total = sum(piece.size for piece in pieces)
        if total > self.peak:
            self.peak, self.at_peak = total, pieces

    def _enter_module(self, module: nn.Module, _: object) -> None:
        self._stack.append(self._names.get(id(module), self._stack[-1] if self._stack else ""))

    def _leave_module(self, *_: object) -> None:
        self._stack.pop()


def _tensors_of(model: nn.Module) -> list[Tensor]:
    tensors = [*model.parameters(), *model.buffers()]
    return tensors + [p.main_grad for p in model.parameters() if hasattr(p, "main_grad")]

"""Memory of tensors without memory: what would be allocated, when, and by which module.

Under a `Meter` every storage that an operation makes is watched until nothing refers to it, as a
GPU's allocator would see it. Works on meta tensors, whose operations cost microseconds.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self
from unittest.mock import patch

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
Label = Callable[[str, str], str]
"""(name of a module, or "" outside all; phase) -> what an allocation there is counted as."""


class _Watched:
    """One storage."""

    __slots__ = ("label", "module", "size", "storage")

    def __init__(self, storage: "weakref.ref[Any]", size: int, label: str, module: str) -> None:
        self.storage, self.size, self.label, self.module = storage, size, label, module


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches what operations on meta tensors allocate inside a `with`.

    Args:
        model: Its modules' names say where an allocation comes from.
        label: What allocations are counted as.
    """

    def __init__(self, model: nn.Module, label: Label) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase = ""
        """What its user is at."""
        self.now: Counter[str] = Counter()
        """Bytes that are there, by label."""
        self.at_peak: Mapping[str, int] = {}
        """The same when their sum was largest."""
        self._label = label
        self._total = self._peak = 0
        self._watched: dict[int, _Watched] = {}
        self._names = {id(module): name for name, module in model.named_modules()}
        self._stack = [""]
        # What is there already is no allocation; holding it keeps its key from being used anew.
        self._own = {t.untyped_storage()._cdata: t for t in _tensors_of(model)}
        self._undo: list[Any] = []

    def __enter__(self) -> Self:
        self._undo = [
            register_module_forward_pre_hook(self._enter_module).remove,
            register_module_forward_hook(self._leave_module, always_call=True).remove,
        ]
        resize = patch.object(torch.UntypedStorage, "resize_", self._resizing())
        resize.start()
        self._undo.append(resize.stop)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        for undo in self._undo:
            undo()

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
                self._watch(leaf.untyped_storage())
        if self._total > self._peak:
            self._peak, self.at_peak = self._total, dict(self.now)
        return result

    def modules(self) -> dict[str, int]:
        """Bytes that are there, by the module that made them."""
        sizes: Counter[str] = Counter()
        for watched in self._watched.values():
            sizes[watched.module] += watched.size
        return dict(sizes)

    @contextmanager
    def at(self, phase: str) -> Iterator[None]:
        """Another phase inside."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._watched or key in self._own:
            return

        def forget(_: object) -> None:
            watched = self._watched.pop(key)
            self._add(watched, -watched.size)

        module = self._stack[-1]
        reference = weakref.ref(storage, forget)
        watched = _Watched(reference, 0, self._label(module, self.phase), module)
        self._watched[key] = watched
        self._add(watched, _rounded(storage.nbytes()))

    def _add(self, watched: _Watched, size: int) -> None:
        watched.size += size
        self.now[watched.label] += size
        self._total += size

    def _resizing(self) -> Callable[[torch.UntypedStorage, int], torch.UntypedStorage]:
        original = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            result: torch.UntypedStorage = original(storage, size)
            if watched := self._watched.get(storage._cdata):
                self._add(watched, _rounded(size) - watched.size)
            return result

        return resize

    def _enter_module(self, module: nn.Module, _: object) -> None:
        self._stack.append(self._names.get(id(module), self._stack[-1]))

    def _leave_module(self, *_: object) -> None:
        self._stack.pop()


def _rounded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _tensors_of(model: nn.Module) -> list[Tensor]:
    tensors = [*model.parameters(), *model.buffers()]
    return tensors + [p.main_grad for p in model.parameters() if hasattr(p, "main_grad")]

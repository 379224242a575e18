"""Megatron-Core's FusedAdam with its update and the clipping before it in one kernel.

Transformer Engine's kernel for masters kept as remainders moves 1.9 TB/s on an H200, whose memory
gives 4.8, and takes no factor for the gradients, so clipping is a pass of its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_MOMENTS = (torch.float32, torch.bfloat16)


@dataclass(slots=True)
class FusedUpdate:
    """`step` of one FusedAdam: the same states and numbers, gradients multiplied on the way."""

    adam: Any
    factor: float = 1.0
    """Of the gradients, in the next step."""

    def __call__(self) -> None:
        """Updates every parameter that has a gradient."""
        from megatron_dsv3.train.adamw_kernel import Hyperparameters, update  # needs Triton

        for group in self.adam.param_groups:
            group["step"] = group.get("step", 0) + 1  # of groups without parameters here, too
            hyper = Hyperparameters.of(group)
            for parameter, gradient in self._with_gradients(group):
                state = self.adam.state[parameter]
                update(
                    parameter.data,
                    gradient,
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    hyper,
                    remainder=state.get("master_param"),
                    factor=self.factor,
                )

    def _with_gradients(self, group: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
        name = "decoupled_grad" if self.adam.use_decoupled_grad else "grad"
        for parameter in group["params"]:
            gradient = getattr(parameter, name, None)
            if gradient is None:
                continue
            if not self.adam.state[parameter]:
                self.adam.initialize_state(parameter, self.adam.store_param_remainders)
            yield parameter, gradient


def fuse_updates(optimizer: Any) -> None:
    """Gives each optimizer whose states the kernel knows a FusedUpdate for a `step`.

    Args:
        optimizer: Megatron-Core's chained one.
    """
    for part in optimizer.chained_optimizers:
        if is_known(part.optimizer):
            part.optimizer.step = FusedUpdate(part.optimizer)


def is_known(adam: Any) -> bool:
    """Transformer Engine's, fp32 masters or bf16 weights with remainders, fp32 or bf16 moments."""
    if not hasattr(adam, "store_param_remainders"):  # none at all, on a CPU, or in host memory
        return False
    parameters = [parameter for group in adam.param_groups for parameter in group["params"]]
    master = torch.bfloat16 if adam.store_param_remainders else torch.float32
    return (
        not adam.capturable
        and adam.master_weights == adam.store_param_remainders
        and adam.exp_avg_dtype in _MOMENTS
        and adam.exp_avg_sq_dtype in _MOMENTS
        and all(parameter.dtype is master for parameter in parameters)
    )

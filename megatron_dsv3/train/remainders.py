"""Masters kept as a bf16 weight and its 16 missing bits, seen whole from outside the optimizer.

With bf16 moments Transformer Engine's FusedAdam keeps of each fp32 master only the lower half; the
upper half is the weight itself, rounded up where the lower half is 0x8000 or more
(`AdamFunctorMasterParamRemainder` in its multi_tensor_adam.cu). Megatron-Core's distributed
optimizer hands those lower halves to checkpoints as if they were the masters, and cannot load.
"""

from typing import Any

import torch
from torch import Tensor

_LOWEST, _HIGHEST = -(2**15), 2**15 - 1


def join(weight: Tensor, remainder: Tensor) -> Tensor:
    """fp32 masters of bf16 `weight` and int16 `remainder`, of one shape."""
    upper = weight.view(torch.int16).int() << 16
    return (upper + remainder.int()).view(torch.float32)


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """bf16 weight and int16 remainder, such that `join` gives back every bit of fp32 `master`."""
    bits = master.contiguous().view(torch.int32)
    remainder = bits.to(torch.int16)  # the lower half, as the two's complement it is
    upper = (bits - remainder.int()) >> 16
    return upper.to(torch.int16).view(torch.bfloat16), remainder


def remainder_of(master: Tensor, weight: Tensor) -> Tensor | None:
    """What makes `weight` to `master`; None where it is not a rounding of it.

    bf16's own rounding differs from FusedAdam's in ties alone; such a master loses its last bit.
    """
    upper = weight.view(torch.int16).int() << 16
    remainder = master.contiguous().view(torch.int32) - upper
    if bool(((remainder < _LOWEST) | (remainder > _HIGHEST + 1)).any()):
        return None
    return remainder.clamp_max_(_HIGHEST).to(torch.int16)


def keep_masters_whole(part: Any) -> None:
    """Lets a distributed optimizer give and take whole masters where FusedAdam keeps remainders."""
    if not getattr(part.optimizer, "store_param_remainders", False):
        return
    get, put = part._get_main_param_and_optimizer_states, part._set_main_param_and_optimizer_states

    def shard(parameter: Tensor) -> Tensor:
        group, order = part.model_param_group_index_map[parameter]
        kept: Tensor = part.optimizer.param_groups[group]["params"][order]
        return kept

    def get_whole(parameter: Tensor) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = get(parameter)
        if tensors["param"].dtype is torch.int16:
            tensors["param"] = join(shard(parameter).detach(), tensors["param"])
        return tensors

    def put_whole(parameter: Tensor, tensors: dict[str, Any]) -> None:
        weight, master = shard(parameter).detach(), tensors.get("param")
        if isinstance(master, Tensor) and weight.dtype is torch.bfloat16:
            remainder = remainder_of(master.to(weight.device), weight)
            if remainder is None:  # weights of another precision: the masters are what counts
                rounded, remainder = split(master.to(weight.device))
                weight.copy_(rounded)
            tensors = {**tensors, "param": remainder}
        put(parameter, tensors)

    part._get_main_param_and_optimizer_states = get_whole
    part._set_main_param_and_optimizer_states = put_whole

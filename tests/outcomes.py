"""Logits and gradients of one model on one input: transformers' and ours, for tests on a GPU."""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hf_reference import Reference
from torch import Tensor

from megatron_dsv3.convert.bridge import Bridge
from megatron_dsv3.convert.tensors import pieces_of
from megatron_dsv3.model.build import wrap
from megatron_dsv3.model.router import PackedRow


@dataclass(frozen=True)
class Outcome:
    """fp32, on the CPU."""

    logits: list[Tensor]
    """[batch, seq, vocab] of each depth."""
    gradients: dict[str, Tensor]
    """Of the sum of all depths' losses, by Hugging Face's names."""

    @property
    def moved(self) -> set[str]:
        """Weights that have a gradient; experts without a token have none."""
        return {name for name, gradient in self.gradients.items() if bool(gradient.any())}

    @property
    def gradient(self) -> Tensor:
        """All of them in one."""
        return torch.cat([self.gradients[name].flatten() for name in sorted(self.gradients)])


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float().cpu() - theirs).norm() / theirs.norm())


def labels_of(tokens: Tensor) -> Tensor:
    """[depth, batch, seq]: the next token, the one after it, 0 behind the end."""
    return torch.stack([F.pad(tokens[:, depth + 1 :], (0, depth + 1)) for depth in range(2)])


def of_transformers(reference: Reference, tokens: Tensor) -> Outcome:
    """On the device of `tokens`, in the dtype of the model."""
    reference.model.zero_grad()
    reference.mtp.zero_grad()
    logits = reference.logits(tokens)
    sum(
        F.cross_entropy(depth.float().flatten(0, 1), label.flatten(), reduction="sum")
        for depth, label in zip(logits, labels_of(tokens), strict=True)
    ).backward()
    return Outcome(
        [depth.detach().float().cpu() for depth in logits],
        {name: gradient.float().cpu() for name, gradient in reference.gradients().items()},
    )


def in_bf16(reference: Reference, device: str) -> Reference:
    """A copy; the experts' biases stay fp32, as they do with us."""
    half = copy.deepcopy(reference)
    for module in (half.model, half.mtp):
        biases = {n: b.clone() for n, b in module.named_buffers() if n.endswith("correction_bias")}
        module.to(device, torch.bfloat16)
        for name, bias in biases.items():
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, bias.to(device))
    return half


def of_ours(bridge: Bridge, tokens: Tensor, *, row: PackedRow | None = None) -> Outcome:
    """Of the loaded model; `tokens` [batch, seq] as documents of one row where `row` says so."""
    [model] = bridge.chunks
    rows, labels = tokens.cuda(), labels_of(tokens).cuda()
    positions = torch.arange(tokens.size(1), device="cuda").expand(tokens.shape)
    if row is not None:
        rows, labels, positions = rows.view(1, -1), labels.view(2, 1, -1), positions.reshape(1, -1)
    with torch.no_grad():
        logits = model(rows, positions, None, packed_seq_params=row)
    wrapped = wrap([model], model.config)
    wrapped[0].zero_grad_buffer()
    wrapped[0](rows, positions, None, labels=labels, packed_seq_params=row).sum().backward()
    gradients = {
        name: piece.float().cpu()
        for param, tensor in bridge.local_tensors()
        if not param.is_buffer
        for name, piece in zip(param.hf, pieces_of(param, tensor.main_grad, 1), strict=True)
    }
    return Outcome([depth.float().cpu().view(*tokens.shape, -1) for depth in logits], gradients)

"""Mistakes that a trainer can make, planted to see that the layout tests find each of them.

Each takes a `pytest.MonkeyPatch`, so that the next case of a launch is free of it.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_dsv3.convert.bridge import Bridge
from megatron_dsv3.model import torch_modules
from megatron_dsv3.model.moe import DeepseekV3MoELayer
from megatron_dsv3.model.router import DeepseekV3Router
from megatron_dsv3.train import step

Patch = pytest.MonkeyPatch


def unreduced_norm_gradient(patch: Patch) -> None:
    """The norms inside linears lose the mark by which TP ranks sum their gradients."""
    original = torch_modules.NormColumnLinear.__init__

    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.layer_norm_weight.sequence_parallel = False

    patch.setattr(torch_modules.NormColumnLinear, "__init__", build)


def labels_across_documents(patch: Patch) -> None:
    """The last token of a document learns to predict the first of the next one."""
    original = step.to_row

    def to_row(batch: Any, groups: Any) -> Any:
        row = original(batch, groups)
        after = torch.roll(row.tokens, -1, dims=1)
        documents = row.packed.documents[0]
        ends = (documents != torch.roll(documents, -1)) & (documents >= 0)
        labels = row.labels.clone()
        mask = row.loss_mask.clone()
        labels[0, 0, ends], mask[0, 0, ends] = after[0, ends], 1.0
        return replace(row, labels=labels, loss_mask=mask)

    patch.setattr(step, "to_row", to_row)


def documents_see_neighbours(patch: Patch) -> None:
    """Attention takes two documents for one."""
    original = step.to_row

    def to_row(batch: Any, groups: Any) -> Any:
        joined = torch.cat([batch.bounds[:1], batch.bounds[2:]])
        ends = batch.tokens.size(1)
        if len(batch.bounds) > 2 and int(batch.bounds[1]) < ends:
            batch = replace(batch, bounds=joined)
        return original(batch, groups)

    patch.setattr(step, "to_row", to_row)


def loss_averaged_per_rank(patch: Patch) -> None:
    """Each rank divides by its own count, and the means are averaged as if those were equal."""
    original = step._weighted_sum

    def weighted_sum(losses: Any, *, mask: Any, weights: Any) -> Any:
        loss, counted, report = original(losses, mask=mask, weights=weights)
        return loss / counted.clamp(min=1), torch.ones_like(counted), report

    patch.setattr(step, "_weighted_sum", weighted_sum)


def layer_placed_twice(patch: Patch) -> None:
    """The second stage fills its first layer with the last one of the stage before."""
    original = Bridge._fill

    def fill(self: Any, param: Any, tensor: Any, reader: Any) -> None:
        [stage] = self.stages
        if stage.pp_rank == 1 and param.layer == stage.layers[0]:
            here, before = f"layers.{param.layer}.", f"layers.{param.layer - 1}."
            param = replace(param, hf=tuple(name.replace(here, before) for name in param.hf))
        original(self, param, tensor, reader)

    patch.setattr(Bridge, "_fill", fill)


def bias_in_bf16(patch: Patch) -> None:
    """The experts' biases pass through bf16, as under a wrapper that casts every buffer."""
    original = DeepseekV3Router._choose

    def choose(self: Any, scores: Any) -> Any:
        kept = self.expert_bias
        self.expert_bias = (kept + 5).bfloat16().float() - 5
        chosen = original(self, scores)
        self.expert_bias = kept
        return chosen

    patch.setattr(DeepseekV3Router, "_choose", choose)


def plan_without_documents(patch: Patch) -> None:
    """The router of a schedule plan is not told which tokens are padding."""
    original = DeepseekV3MoELayer.route

    def route(self: Any, hidden_states: Any, padding_mask: Any = None) -> Any:
        self.membership = None
        return original(self, hidden_states, padding_mask)

    patch.setattr(DeepseekV3MoELayer, "route", route)


MISTAKES: dict[str, Callable[[Patch], None]] = {
    "an unreduced gradient under TP": unreduced_norm_gradient,
    "labels shifted across documents": labels_across_documents,
    "documents that see their neighbours": documents_see_neighbours,
    "the loss averaged per rank": loss_averaged_per_rank,
    "a layer placed twice": layer_placed_twice,
    "a bf16 bias": bias_in_bf16,
    "a schedule plan that forgets documents": plan_without_documents,
}

"""Load of every expert, and the policy that moves the experts' biases (paper section 2.1.2)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dsv3.config.sections import ExpertsSection
from megatron_dsv3.model.groups import Groups
from megatron_dsv3.model.router import DeepseekV3Router


class ExpertBalance:
    """Counts of one step and biases of this rank's routers.

    The biases are moved here, not in Megatron-Core's gradient reduction: after the update, and not
    at all in a step that is left out.
    """

    def __init__(
        self, routers: Sequence[DeepseekV3Router], groups: Groups, section: ExpertsSection
    ) -> None:
        self.routers, self.groups, self.section = list(routers), groups, section
        self.layers = [_layer_of(router) for router in self.routers]
        """Global layer of each router; MTP layers count on after the decoder's."""
        self._loaded = [router.expert_bias.clone() for router in self.routers]
        self._counts: Tensor | None = None
        for router in self.routers:
            router.frozen_expert_bias = True  # Megatron-Core's own update stays off

    def read(self) -> None:
        """Takes the counts of a step, before Megatron-Core resets them."""
        if self.routers:
            self._counts = torch.stack([r.local_tokens_per_expert.clone() for r in self.routers])

    def reduce(self) -> None:
        """Collective: sums the counts over all ranks that share the layers."""
        if self._counts is not None:
            dist.all_reduce(self._counts, group=self.groups.collection.tp_dp_cp)

    def ratio(self) -> Tensor:
        """Collective: largest load over the mean, averaged over all layers of the model; scalar.

        On the device, float64.
        """
        sums = torch.zeros(2, device=self.groups.device, dtype=torch.float64)
        if self._counts is not None:
            per_layer = self._counts.amax(1) / self._counts.mean(1).clamp(min=1e-9)
            sums[0] = per_layer.sum()
            sums[1].fill_(len(per_layer))
        dist.all_reduce(sums, group=self.groups.collection.pp)
        return sums[0] / sums[1].clamp(min=1)

    def loads(self) -> dict[int, list[int]]:
        """Collective: tokens of every expert by layer, over the whole model."""
        mine = {} if self._counts is None else dict(zip(self.layers, self._counts, strict=True))
        return self._everywhere({layer: counts.long().tolist() for layer, counts in mine.items()})

    @torch.no_grad()
    def update_biases(self, lr_fraction: float) -> None:
        """Moves each bias one step towards balance, as the policy says.

        Args:
            lr_fraction: Learning rate of this step over the largest of the run.
        """
        if self.section.bias == "freeze" or self._counts is None:
            return
        rate = self.section.bias_update_rate
        rate *= lr_fraction if self.section.bias == "decay" else 1.0
        errors = self._counts.mean(1, keepdim=True) - self._counts
        for router, error in zip(self.routers, errors, strict=True):
            if router.weight.requires_grad:  # a frozen MTP layer keeps its bias, too
                router.expert_bias += rate * error.sign()

    def drift(self) -> dict[int, float]:
        """Collective: largest change of a bias since the start, by layer, over the whole model."""
        changes = {
            layer: (router.expert_bias - loaded).abs().max().item()
            for layer, router, loaded in zip(self.layers, self.routers, self._loaded, strict=True)
        }
        return self._everywhere(changes)

    def biases_at_start(self) -> dict[int, list[float]]:
        """Collective: what `drift` compares with, by layer, over the whole model."""
        loaded = zip(self.layers, self._loaded, strict=True)
        return self._everywhere({layer: bias.tolist() for layer, bias in loaded})

    def restore_start(self, biases: Mapping[int, Sequence[float]]) -> None:
        """Takes `biases_at_start` of the run that this one goes on from."""
        for layer, loaded in zip(self.layers, self._loaded, strict=True):
            loaded.copy_(torch.tensor(biases[layer]))

    def check(self) -> None:
        """Raises AssertionError where a wrapper has rounded a bias or a counter."""
        for layer, router in zip(self.layers, self.routers, strict=True):
            dtypes = {router.expert_bias.dtype, router.local_tokens_per_expert.dtype}
            assert dtypes == {torch.float32}, f"layer {layer}: expert bias or counter is {dtypes}"

    def _everywhere(self, mine: dict[int, Any]) -> dict[int, Any]:
        """Joins the stages' parts, in layer order."""
        group = self.groups.collection.pp
        parts: list[dict[int, Any]] = [mine] * group.size()
        dist.all_gather_object(parts, mine, group=group)
        joined = {layer: value for part in parts for layer, value in part.items()}
        return dict(sorted(joined.items()))


def _layer_of(router: DeepseekV3Router) -> int:
    assert router.layer_number is not None
    before = router.config.num_layers if router.is_mtp_layer else 0
    return before + int(router.layer_number) - 1

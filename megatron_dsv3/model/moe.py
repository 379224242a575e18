"""The expert layer, in an order that keeps a GPU busy while the host waits for the choice.

How many tokens each expert got has to be read on the host before its products can be started. In
Megatron-Core's order nothing is left to compute meanwhile, and what follows is started late.
"""

from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAlltoAllTokenDispatcher,
    MoETokenDispatcher,
)
from torch import Tensor


class LocalDispatcher(MoEAlltoAllTokenDispatcher):
    """MoEAlltoAllTokenDispatcher of one rank that holds all experts.

    The first permutation has grouped the tokens by expert; what would sort chunks from several
    ranks copies them as they are.
    """

    tokens_per_expert: Tensor | None

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Any, Any, Any]:
        """Tokens, their number by expert on the host, weights."""
        counts = self._maybe_dtoh_and_synchronize("before_finish", self.tokens_per_expert)
        self.tokens_per_expert = None
        return hidden_states, counts, probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """The experts' outputs as they are."""
        return hidden_states


class DeepseekV3MoELayer(MoELayer):
    """MoELayer that starts its shared expert between the choice and the wait for it.

    Megatron-Core computes the shared expert first: then the GPU has nothing to do from the end of
    the choice until the host has read it and started the routed experts.
    """

    token_dispatcher: MoETokenDispatcher
    membership: Tensor | None = None
    """Of the row at work, in a schedule plan alone: it calls `route` without a `padding_mask`."""
    _shared_output: Tensor | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        dispatcher = self.token_dispatcher
        self._routes_first = (
            not self.shared_expert_overlap
            # Their schedules call the parts of this layer themselves.
            and not self.config.overlap_moe_expert_parallel_comm
            and self.config.cuda_graph_impl == "none"
            # The other kind leaves its input's gradient in a buffer of Megatron-Core's, into which
            # the shared expert's backward, next in this order, gathers under tensor parallelism.
            and isinstance(dispatcher, MoEAlltoAllTokenDispatcher)
        )
        if (
            self._routes_first
            and isinstance(dispatcher, MoEAlltoAllTokenDispatcher)
            and dispatcher.ep_size * dispatcher.tp_size == 1
        ):
            self.token_dispatcher = LocalDispatcher(
                self.num_local_experts,
                self.local_expert_indices,
                config=self.config,
                pg_collection=kwargs.get("pg_collection"),
            )

    def route(
        self, hidden_states: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Weights and choice of the experts."""
        membership, self.membership = self.membership, None
        chosen: tuple[Tensor, Tensor] = super().route(
            hidden_states, membership if padding_mask is None else padding_mask
        )
        return chosen

    def shared_experts_compute(self, hidden_states: Tensor) -> Tensor | None:
        """The shared expert's output; None: `preprocess` will compute it."""
        if self._routes_first:
            return None
        output: Tensor | None = super().shared_experts_compute(hidden_states)
        return output

    def preprocess(
        self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens grouped for sending and their weights; counts are on their way to the host."""
        grouped, weights = super().preprocess(hidden_states, probs, routing_map)
        if self._routes_first:
            self._shared_output = super().shared_experts_compute(hidden_states)
        return grouped, weights

    def postprocess(self, output: Tensor, shared_expert_output: Tensor | None) -> Tensor:
        """[seq, batch, hidden]: routed and shared experts' sum."""
        if self._routes_first:
            shared_expert_output, self._shared_output = self._shared_output, None
        summed: Tensor = super().postprocess(output, shared_expert_output)
        return summed

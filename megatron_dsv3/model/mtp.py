"""The MTP layer, fed with the tokens that the row brings."""

from collections.abc import Callable
from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from megatron_dsv3.model.router import PackedRow


class DeepseekV3MTPLayer(MultiTokenPredictionLayer):
    """MultiTokenPredictionLayer whose second input comes with a `PackedRow`.

    Megatron-Core shifts the tokens itself, document by document: for each it reads the bounds on
    the host, which waits until the device has nothing left to do, and with context parallelism it
    sends the tokens at the borders in messages of their own.
    """

    def _get_embeddings(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        embedding: Callable[..., Tensor],
        hidden_states: Tensor,
        packed_seq_params: PackedSeqParams | None = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Any, ...]:
        """Ids, positions and mask for the next layer, the tokens' embeddings, hidden states."""
        row = packed_seq_params
        if not isinstance(row, PackedRow) or row.tokens_ahead is None:
            got: tuple[Any, ...] = super()._get_embeddings(
                input_ids, position_ids, embedding, hidden_states, row, padding_mask
            )
            return got
        tokens = row.tokens_ahead[self.layer_number - 1][None]
        embedded = embedding(input_ids=tokens, position_ids=position_ids)
        hidden_states = make_viewless_tensor(hidden_states, requires_grad=True, keep_graph=True)
        if not hidden_states.requires_grad:  # recomputation needs an input that does
            hidden_states.requires_grad_(True)
        return input_ids, position_ids, padding_mask, embedded, hidden_states

"""GPTModel whose output is one loss per token for every prediction depth."""

from typing import Any

import torch
from megatron.core.models.common.model_chunk_schedule_plan import TransformerModelChunkSchedulePlan
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlock
from torch import Tensor


class SchedulePlan(TransformerModelChunkSchedulePlan):
    """Megatron-Core's plan of a chunk, in which MTP's layers are part of what follows the decoder.

    Its own plan of an MTP layer takes no packed rows.
    """

    def _build_layer_schedule_plan(self, module: Any, *streams: Any) -> None:
        if not isinstance(module, MultiTokenPredictionBlock):
            super()._build_layer_schedule_plan(module, *streams)


class DeepseekV3Model(GPTModel):
    """GPTModel without Megatron-Core's own MTP loss.

    That one shifts labels itself and divides by counts local to a rank and a row, so its gradients
    depend on the layout. Here labels of all depths come in ready, and the caller weighs the losses.
    """

    def build_schedule_plan(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        *,
        labels: Tensor,
        packed_seq_params: Any,
    ) -> SchedulePlan:
        """`forward` in parts that run beside those of another micro-batch's backward."""
        return SchedulePlan(
            self,
            input_ids,
            position_ids,
            attention_mask,
            labels=labels,
            packed_seq_params=packed_seq_params,
        )

    def _postprocess(
        self,
        hidden_states: Tensor,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor | None,
        *,
        attention_mask: Tensor | None = None,
        packed_seq_params: Any = None,
        **_: object,
    ) -> Tensor:
        """Hidden states -> losses or logits.

        Args:
            hidden_states: [seq, batch, hidden] of the last decoder layer, normalised.
            input_ids: [batch, seq].
            position_ids: [batch, seq].
            labels: [1 + num_mtp, batch, seq]: depth k predicts the token k + 1 ahead; None: logits.
            attention_mask: Causal masks need none.
            packed_seq_params: Bounds of packed documents.

        Returns:
            Losses [1 + num_mtp, batch, seq], or without labels the logits [1 + num_mtp, batch, seq,
            vocab / tp]; a stage without the output layer returns its hidden states.
        """
        if self.mtp_process:
            hidden_states = self.mtp(
                input_ids=input_ids,
                position_ids=position_ids,
                hidden_states=hidden_states,
                attention_mask=attention_mask,
                packed_seq_params=packed_seq_params,
                embedding=self.embedding,
            )
        if not self.post_process:
            return hidden_states
        depths = hidden_states.chunk(1 + (self.config.mtp_num_layers or 0), dim=0)
        if labels is None:
            return torch.stack([self._logits(depth).transpose(0, 1) for depth in depths])
        # The cross-entropy overwrites the logits of its depth, so each depth takes its own.
        losses = [
            self.compute_language_model_loss(label, self._logits(depth))
            for label, depth in zip(labels, depths, strict=True)
        ]
        return torch.stack(losses)

    def _logits(self, hidden_states: Tensor) -> Tensor:
        weight = None
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        logits: Tensor = self.output_layer(hidden_states, weight=weight)[0]
        return logits

"""Samples to the tensors of one micro-batch.

Labels are shifted here, inside each document, before anything is sliced for parallelism: no rank
ever has to fetch a target from its neighbour, and no document predicts the next one's first token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from megatron_dsv3.data.store import Sample


@dataclass(frozen=True)
class Batch:
    """One micro-batch of b padded rows; depth 0 is the main model's target, depth k MTP's k-th."""

    tokens: torch.Tensor
    """[b, s], int64."""
    position_ids: torch.Tensor
    """[b, s], int64; restarts with each document."""
    labels: torch.Tensor
    """[1 + num_mtp, b, s], int64: the token 1 + depth further on in the same document; 0 where
    `loss_mask` is 0."""
    loss_mask: torch.Tensor
    """[1 + num_mtp, b, s], float32: 1 where that token exists and counts."""
    padding: torch.Tensor
    """[b, s], bool: True where there is no token."""
    sample_ids: tuple[str, ...]


@dataclass(frozen=True)
class Targets:
    """labels: [depths, n], int64; loss_mask: [depths, n], float32."""

    labels: npt.NDArray[np.int64]
    loss_mask: npt.NDArray[np.float32]


def make_batch(samples: Sequence[Sample], *, seq_length: int, num_mtp: int, pad_id: int) -> Batch:
    """One sample a row, padded on the right to `seq_length`."""
    depths, shape = 1 + num_mtp, (len(samples), seq_length)
    tokens = np.full(shape, pad_id, np.int64)
    labels = np.zeros((depths, *shape), np.int64)
    loss_mask = np.zeros((depths, *shape), np.float32)
    padding = np.ones(shape, np.bool_)
    for row, sample in enumerate(samples):
        n = len(sample.tokens)
        if n > seq_length:
            raise ValueError(f"{sample.id}: {n} tokens don't fit a sequence of {seq_length}")
        targets = shift_targets(sample, depths)
        tokens[row, :n] = sample.tokens
        labels[:, row, :n] = targets.labels
        loss_mask[:, row, :n] = targets.loss_mask
        padding[row, :n] = False
    return Batch(
        tokens=torch.from_numpy(tokens),
        position_ids=torch.arange(seq_length).repeat(len(samples), 1),
        labels=torch.from_numpy(labels),
        loss_mask=torch.from_numpy(loss_mask),
        padding=torch.from_numpy(padding),
        sample_ids=tuple(sample.id for sample in samples),
    )


def shift_targets(sample: Sample, depths: int) -> Targets:
    """What each token of one document predicts at each depth."""
    n = len(sample.tokens)
    labels = np.zeros((depths, n), np.int64)
    loss_mask = np.zeros((depths, n), np.float32)
    for depth in range(min(depths, n)):
        shift = 1 + depth
        labels[depth, : n - shift] = sample.tokens[shift:]
        loss_mask[depth, : n - shift] = sample.loss[shift:]
    return Targets(labels * (loss_mask > 0), loss_mask)


def counted_tokens(batch: Batch) -> torch.Tensor:
    """Targets that count, by depth: [1 + num_mtp], int64, exact."""
    return batch.loss_mask.sum(dim=(1, 2), dtype=torch.int64)

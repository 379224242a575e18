"""Documents to the tensors of one micro-batch.

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
    """One micro-batch of b rows; depth 0 is the main model's target, depth k MTP's k-th.

    A document's padding is its tail; what no document takes up of a row is a document of padding.
    """

    tokens: torch.Tensor
    """[b, s], int64."""
    position_ids: torch.Tensor
    """[b, s], int64; restarts with each document."""
    labels: torch.Tensor
    """[1 + num_mtp, b, s], int64: the token 1 + depth further on in the same document; 0 where
    `loss_mask` is 0."""
    loss_mask: torch.Tensor
    """[1 + num_mtp, b, s], float32: 1 where that token exists and counts."""
    documents: torch.Tensor
    """[b, s], int64: number of the token's document in this batch; -1 where there is no token."""
    bounds: torch.Tensor
    """[documents + 1], int32: where each document begins in the rows laid end to end, and where the
    last one ends; padding included."""
    sample_ids: tuple[str, ...]

    @property
    def padding(self) -> torch.Tensor:
        """[b, s], bool: True where there is no token."""
        return self.documents < 0

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """[documents]: tokens of each, padding not counted."""
        # In numpy: in torch's selection by a mask a step on a machine of 32 cores spent a tenth of
        # its time (sampled; docs/performance.md).
        numbers = self.documents.numpy()
        return np.bincount(numbers[numbers >= 0], minlength=len(self.bounds) - 1)


@dataclass(frozen=True)
class Targets:
    """labels: [depths, n], int64; loss_mask: [depths, n], float32."""

    labels: npt.NDArray[np.int64]
    loss_mask: npt.NDArray[np.float32]


def make_batch(samples: Sequence[Sample], *, seq_length: int, num_mtp: int, pad_id: int) -> Batch:
    """One sample a row, padded on the right to `seq_length`."""
    rows = [(sample,) for sample in samples]
    return pack_batch(
        rows, row_length=seq_length, multiple=seq_length, num_mtp=num_mtp, pad_id=pad_id
    )


def pack_batch(
    rows: Sequence[Sequence[Sample]], *, row_length: int, multiple: int, num_mtp: int, pad_id: int
) -> Batch:
    """The documents of each row one after another.

    Args:
        rows: Documents by row; a row may have none.
        row_length: Tokens of a row, a multiple of `multiple`.
        multiple: Each document is padded to a multiple of it.
        num_mtp: Further tokens to predict.
        pad_id: Token of padding.

    Raises:
        ValueError: The documents of a row don't fit it.
    """
    shape, depths = (len(rows), row_length), 1 + num_mtp
    tokens = np.full(shape, pad_id, np.int64)
    labels = np.zeros((depths, *shape), np.int64)
    loss_mask = np.zeros((depths, *shape), np.float32)
    documents = np.full(shape, -1, np.int64)
    bounds = [0]
    for row, samples in enumerate(rows):
        start = 0
        for sample in samples:
            n = len(sample.tokens)
            here = slice(start, start + n)
            start += -(-n // multiple) * multiple
            if start > row_length:
                raise ValueError(_does_not_fit(sample, samples, row_length))
            if not n:
                continue
            targets = shift_targets(sample, depths)
            tokens[row, here] = sample.tokens
            labels[:, row, here] = targets.labels
            loss_mask[:, row, here] = targets.loss_mask
            documents[row, here] = len(bounds) - 1
            bounds.append(row * row_length + start)
        if start < row_length:
            bounds.append((row + 1) * row_length)
    starts, lengths = np.array(bounds[:-1]), np.diff(bounds)
    positions = np.arange(tokens.size) - starts.repeat(lengths)
    return Batch(
        tokens=torch.from_numpy(tokens),
        position_ids=torch.from_numpy(positions.reshape(shape)),
        labels=torch.from_numpy(labels),
        loss_mask=torch.from_numpy(loss_mask),
        documents=torch.from_numpy(documents),
        bounds=torch.tensor(bounds, dtype=torch.int32),
        sample_ids=tuple(sample.id for samples in rows for sample in samples),
    )


def _does_not_fit(sample: Sample, samples: Sequence[Sample], row_length: int) -> str:
    together = f", with the {len(samples) - 1} others of its row," if len(samples) > 1 else ""
    return (
        f"{sample.id}: {len(sample.tokens)} tokens{together} don't fit a sequence of {row_length}"
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


def counted_tokens(batch: Batch) -> npt.NDArray[np.int64]:
    """Targets that count, by depth: [1 + num_mtp], exact."""
    counted: npt.NDArray[np.int64] = np.sum(batch.loss_mask.numpy(), axis=(1, 2), dtype=np.int64)
    return counted

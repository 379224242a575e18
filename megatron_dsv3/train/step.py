"""One optimizer step: micro-batches -> losses, gradients, update.

The loss is a sum over counted tokens, divided by their global number before the first backward, so
neither the number of micro-batches nor the layout changes it, and no gradient is scaled afterwards.
Per-token losses of every depth come from the model; labels and masks come from the data, made
before any slicing.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_dsv3.config.sections import ExpertsSection, SpikesSection
from megatron_dsv3.data.batch import Batch, counted_tokens
from megatron_dsv3.model.attention import zigzag
from megatron_dsv3.model.build import routers
from megatron_dsv3.model.groups import Groups
from megatron_dsv3.model.router import PackedRow
from megatron_dsv3.train.experts import ExpertBalance
from megatron_dsv3.train.optimizer import clip_and_update, gradient_norm
from megatron_dsv3.train.signals import StopRequest
from megatron_dsv3.train.spikes import NonFiniteError, SpikeError, SpikeGuard


@dataclass(frozen=True, slots=True)
class Row:
    """A micro-batch as this rank's one packed row."""

    tokens: Tensor
    """[1, tokens]"""
    position_ids: Tensor
    labels: Tensor
    """[1 + num_mtp, 1, tokens]"""
    loss_mask: Tensor
    packed: PackedRow


@dataclass(frozen=True, slots=True)
class Counts:
    """Of the global batch, the same on every rank."""

    counted: Tensor
    """[1 + num_mtp], float64: targets that count, by depth."""
    documents: int
    tokens: int
    """Real tokens, padding not counted."""
    squares: int
    """Of the documents' tokens, summed: what causal attention inside each costs grows with it."""

    @classmethod
    def of(cls, vector: Tensor) -> "Counts":
        """From what `global_counts` sums, on the host."""
        documents, tokens, squares = (int(value) for value in vector[-3:])
        return cls(vector[:-3], documents=documents, tokens=tokens, squares=squares)


@dataclass(frozen=True, slots=True)
class Losses:
    """Means over counted tokens, equal on every rank."""

    main: float
    mtp: float | None
    """Mean over depths; None: no MTP."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step was; equal on every rank."""

    losses: Losses
    grad_norm: float
    """Before clipping; NaN where the step was left out before it was known."""
    counts: Counts
    expert_balance: float
    """Largest expert load over the mean, averaged over layers; 1 is perfect balance."""
    skipped: str | None = None
    """Why the update was left out; None: it was done."""


def to_row(batch: Batch, groups: Groups) -> Row:
    """Lays the rows of a batch end to end, and takes this rank's part under context parallelism.

    Padding stays at the tail of its document: it is seen by no real token, and no loss counts it.
    """
    documents = _members_by_depth(batch.documents.reshape(-1), num_depths=len(batch.labels))
    ahead = tokens_ahead(batch.tokens.reshape(-1), batch.bounds, num_mtp=len(batch.labels) - 1)
    flat = [batch.tokens, batch.position_ids, batch.labels, batch.loss_mask]
    tensors = [tensor.flatten(-2) for tensor in flat] + [documents, ahead]
    cp_size = groups.collection.cp.size()
    if cp_size > 1:
        parts = [
            start + zigzag(stop - start, cp_rank=groups.cp_rank, cp_size=cp_size)
            for start, stop in pairwise(batch.bounds.tolist())
        ]
        tensors = [tensor[..., torch.cat(parts)] for tensor in tensors]
    tokens, positions, labels, mask, documents, ahead, bounds = (
        _sent(tensor, groups.device) for tensor in [*tensors, batch.bounds]
    )
    # Attention kernels on a GPU are planned anew for each bound of the lengths: give them few.
    longest = 1 << (int(batch.bounds.diff().max()) - 1).bit_length()
    longest = min(longest, batch.tokens.numel())
    packed = PackedRow(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        documents=documents,
        tokens_ahead=ahead,
        num_documents=len(bounds) - 1,
    )
    return Row(tokens[None], positions[None], labels[:, None], mask[:, None], packed)


def _members_by_depth(documents: Tensor, *, num_depths: int) -> Tensor:
    """[tokens] -> [depths, tokens]: at depth k only tokens whose k-th next is of their document.

    That one is an MTP layer's second input. A document's last k have none: the layer sees padding
    there, or the next document, which is nothing to count an expert's load by.
    """
    rows = [documents]
    for depth in range(1, num_depths):
        ahead = F.pad(documents[depth:], (0, min(depth, len(documents))), value=-1)
        rows.append(torch.where(ahead == documents, documents, -1))
    return torch.stack(rows)


def tokens_ahead(tokens: Tensor, bounds: Tensor, *, num_mtp: int) -> Tensor:
    """[tokens] -> [num_mtp, tokens]: the next, the one after; 0 past the end of its document."""
    rows, last = [], bounds[1:].long() - 1
    for _ in range(num_mtp):
        tokens = tokens.roll(-1)
        tokens[last] = 0
        rows.append(tokens)
    return torch.stack(rows) if rows else tokens.new_zeros(0, len(tokens))


def global_counts(batches: Sequence[Batch], groups: Groups) -> Tensor:
    """Sums over all data-parallel ranks: [1 + num_mtp + 3], float64, in the order of `Counts`.

    Losses are divided by them on the device, which the host does not wait for.
    """
    counted = np.stack([counted_tokens(batch) for batch in batches]).sum(0)
    lengths = np.concatenate([batch.lengths for batch in batches])
    sums = [(lengths > 0).sum(), lengths.sum(), np.square(lengths).sum()]
    vector = _sent(torch.from_numpy(np.array([*counted, *sums], np.float64)), groups.device)
    dist.all_reduce(vector, group=groups.collection.dp)
    return vector


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The same on a device, which may still be at the step before; the host does not wait."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class TrainStep:
    """Forward, backward and update over the micro-batches of one global batch."""

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        optimizer: Any,
        groups: Groups,
        *,
        mtp_loss_weight: float,
        experts: ExpertsSection = ExpertsSection(),
        spikes: SpikesSection = SpikesSection(),
    ) -> None:
        self.chunks, self.optimizer, self.groups = list(chunks), optimizer, groups
        self.mtp_loss_weight = mtp_loss_weight
        self.config = self.chunks[0].config
        self.routers = routers(self.chunks)
        self.experts = ExpertBalance(self.routers, groups, experts)
        self.experts.check()
        self.guard = SpikeGuard(spikes)
        self.stop_request = StopRequest()
        self._finalize = self.config.finalize_model_grads_func
        self.config.finalize_model_grads_func = self._read_loads_then_finalize

    def __call__(self, batches: Sequence[Batch], *, lr_fraction: float = 1.0) -> StepResult:
        """Trains on this data-parallel rank's micro-batches.

        Args:
            batches: Micro-batches, equally many on every rank.
            lr_fraction: Learning rate of this step over the largest of the run.

        Raises:
            NonFiniteError: A loss or the gradient norm is not finite; nothing was updated. Names
                the rank and the samples.
            SpikeError: The loss is a spike; nothing was updated.
            ValueError: No token of the global batch counts; nothing was updated.
        """
        summed = global_counts(batches, self.groups)
        self._prepare(summed)  # first: the device clears gradients while the host lays out rows
        outputs = self._run(batches, summed, forward_only=False)
        self.experts.reduce()
        # The host waits for the device once, in the norm. All else that it wants to know is summed
        # before and read right after, so that it starts the next step during the update.
        figures = [self._sum_losses(outputs, summed), summed, self.experts.ratio()[None]]
        sums = torch.cat(figures)
        norm = gradient_norm(self.optimizer)
        loss_sums, vector, balance = sums.cpu().split([len(part) for part in figures])
        counts = Counts.of(vector)
        self.stop_request.agreed = bool(loss_sums[-1])
        if counts.counted[0] == 0:
            raise ValueError("the global batch holds no counted token; check the data's loss flags")
        losses, grad_norm, skipped = Losses(math.nan, None), math.nan, None
        try:
            losses = self._losses(loss_sums, counts, outputs, batches)
            if reason := self.guard.explain(losses.main):
                raise SpikeError(f"{reason}; {self._blame_all(batches)}")
            if not math.isfinite(norm):
                raise NonFiniteError(
                    f"gradient norm is {norm}; losses were finite; {self._blame_all(batches)}"
                )
            grad_norm = norm
            clip_and_update(self.optimizer, norm)
            self.experts.update_biases(lr_fraction)
            self.guard.keep(losses.main)
        except (NonFiniteError, SpikeError) as error:
            self.guard.skip(error)
            skipped = str(error)
        return StepResult(losses, grad_norm, counts, balance.item(), skipped)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> Losses:
        """Losses without gradients or any other trace."""
        summed = global_counts(batches, self.groups)
        for chunk in self.chunks:
            chunk.eval()
        try:
            outputs = self._run(batches, summed, forward_only=True)
        finally:
            for chunk in self.chunks:
                chunk.train()
        loss_sums, counts = self._sum_losses(outputs, summed).cpu(), Counts.of(summed.cpu())
        return self._losses(loss_sums, counts, outputs, batches)

    def settle(self) -> None:
        """Before the weights are saved: waits for those still being gathered, checks the biases."""
        self.experts.check()
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    def state(self) -> dict[str, Any]:
        """Collective: what a run needs to go on besides weights and optimizer; plain values."""
        return {"spikes": self.guard.state(), "biases_at_start": self.experts.biases_at_start()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`, in this layout or another."""
        self.guard.restore(state["spikes"])
        self.experts.restore_start(state["biases_at_start"])

    def _prepare(self, summed: Tensor) -> None:
        documents, tokens, _ = summed[-3:].float()
        for router in self.routers:
            router.balance_weight = 1 / documents
            router.token_weight = 1 / tokens
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def _blame_all(self, batches: Sequence[Batch]) -> str:
        """Collective: the samples of the global batch, the same on every rank."""
        group = self.groups.collection.dp
        everyones: list[list[str]] = [[]] * group.size()
        dist.all_gather_object(everyones, _sample_ids(batches), group=group)
        return _named(sample for ids in everyones for sample in ids)

    def _run(
        self, batches: Sequence[Batch], summed: Tensor, *, forward_only: bool
    ) -> list[dict[str, Tensor]]:
        made: list[Row] = []

        def row(number: int) -> Row:
            # The later micro-batches while the device is at the earlier; chunks share them.
            if number == len(made):
                made.append(to_row(batches[number], self.groups))
            return made[number]

        iterators = [map(row, range(len(batches))) for _ in self.chunks]
        outputs: list[dict[str, Tensor]] = get_forward_backward_func()(
            forward_step_func=partial(
                _forward, weights=loss_weights(summed[:-3], self.mtp_loss_weight)
            ),
            data_iterator=iterators if len(self.chunks) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(batches),
            seq_length=batches[0].tokens.numel(),
            micro_batch_size=1,
            forward_only=forward_only,
        )
        return outputs

    def _sum_losses(self, outputs: list[dict[str, Tensor]], summed: Tensor) -> Tensor:
        """Collective: loss sums by depth; ranks with one that is not finite; ranks told to stop."""
        rows = summed.new_zeros(1, len(summed) - 3)
        if outputs and self.groups.tp_rank == 0:  # TP ranks hold the same losses
            rows = torch.stack([output["sums"] for output in outputs]).to(summed)
        told = summed.new_full((1,), float(self.stop_request.received is not None))
        sums = torch.cat([rows.sum(0), rows.isfinite().all().logical_not()[None], told])
        dist.all_reduce(sums)
        return sums

    def _losses(
        self,
        loss_sums: Tensor,
        counts: Counts,
        outputs: list[dict[str, Tensor]],
        batches: Sequence[Batch],
    ) -> Losses:
        """Mean loss by depth, equal on every rank. Raises NonFiniteError on every rank."""
        if loss_sums[-2]:
            finite = [bool(output["sums"].isfinite().all()) for output in outputs]
            broken = [batch for batch, fine in zip(batches, finite, strict=False) if not fine]
            blame = f"rank {self.groups.rank}: {_named(_sample_ids(broken))}" if broken else ""
            everyone: list[str] = [""] * self.groups.world_size
            dist.all_gather_object(everyone, blame if self.groups.tp_rank == 0 else "")
            raise NonFiniteError("loss is not finite; " + "; ".join(filter(None, everyone)))
        means = loss_sums[:-2] / counts.counted.clamp(min=1)
        return Losses(means[0].item(), means[1:].mean().item() if len(means) > 1 else None)

    def _read_loads_then_finalize(
        self, chunks: list[nn.Module], num_tokens: Tensor | None = None, **kwargs: Any
    ) -> None:
        """Megatron-Core's reduction of gradients also resets the load counters: read them first.

        It would divide all gradients by `num_tokens` in a pass over memory; the losses are divided.
        """
        self.experts.read()
        self._finalize(chunks, None, **kwargs)


def loss_weights(counted: Tensor, mtp_loss_weight: float) -> Tensor:
    """What multiplies the loss sum of each depth, [1 + num_mtp], float32.

    It makes means over the global batch of the sums; the MTP depths share `mtp_loss_weight`
    (paper eq. 25).
    """
    weights = torch.full_like(counted, mtp_loss_weight / max(len(counted) - 1, 1))
    weights[:1].fill_(1.0)  # a number set by its index is a copy that the host waits for
    return torch.where(counted > 0, weights / counted, 0.0).float()


def _forward(
    rows: Iterator[Row], model: nn.Module, return_schedule_plan: bool = False, *, weights: Tensor
) -> tuple[Any, Callable[[Tensor], Any]]:
    """Megatron-Core's forward step: output, or the plan of it; the function that makes the loss."""
    row = next(rows)
    run = cast(Any, model).build_schedule_plan if return_schedule_plan else model
    output = run(
        row.tokens,
        row.position_ids,
        None,
        labels=row.labels,
        packed_seq_params=row.packed,
    )
    return output, partial(_weighted_sum, mask=row.loss_mask, weights=weights)


def _weighted_sum(
    losses: Tensor, *, mask: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss to differentiate, counted tokens of this rank, sums to report."""
    # A masked token's loss may be infinite (label 0 on padding); 0 * inf would be NaN.
    sums = torch.where(mask > 0, losses.float(), 0.0).sum((1, 2))
    return (sums * weights).sum(), mask[0].sum().int(), {"sums": sums.detach()}


def _sample_ids(batches: Sequence[Batch]) -> list[str]:
    """Without those that fill a batch up, which have no name."""
    return [sample for batch in batches for sample in batch.sample_ids if sample]


def _named(samples: Iterable[str]) -> str:
    ids = list(dict.fromkeys(samples))
    shown = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
    return f"samples {shown}"

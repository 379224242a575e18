"""A running, distributed model against transformers' layers, part by part, with a verdict.

Each part of the reference (embedding, layer, head) gets the *live* model's own input to that part,
so errors do not add up over the depth, one bound holds for every layer, and a part that differs is
the one that is wrong. Equal parts on equal inputs make equal models; that the inputs are the live
ones' outputs covers what passes between pipeline stages, too. The loss that the trainer reports is
compared with that of the reference's logits. Beside that the reference's main model runs on its own
from the tokens on, to say how far rounding drives the two apart.

Rounding may make a router choose another expert where two are nearly tied. So the reference takes
the live model's choice, which must be its own wherever that is clear beyond rounding.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from megatron_dsv3.convert.hf_layers import HFLayers
from megatron_dsv3.convert.live_capture import (
    EMBEDDING,
    Gathered,
    choice_key,
    layer_key,
    logits_key,
    mtp_key,
)


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What a number format of the live model may change; the reference computes in fp32."""

    update: float
    """Error of a token's vector over the norm of what the part adds to its input, as the root mean
    square over the tokens; a single token may have `OUTLIER` times it."""
    rounding: float
    """The same over the norm of the whole vector: it is stored in that format."""
    loss: float
    """Relative error of the mean loss."""
    router_noise: float
    """Relative error of each product in a router's logits; decides which choices are clear. In bf16
    4e-3 was seen behind a residual stream, and 2.4e-2 for one in a hundred tokens of an MTP layer,
    which has none in front of it."""


OUTLIER = 4.0
"""Rounding is not alike for all tokens: it counts most where attention is sharp."""
TOLERANCES = {
    torch.float32: Tolerance(update=3e-5, rounding=1e-6, loss=1e-5, router_noise=4e-6),
    torch.bfloat16: Tolerance(update=3e-2, rounding=4e-3, loss=2e-3, router_noise=2e-2),
}


@dataclass(frozen=True, slots=True)
class Document:
    """One sample, as both models see it."""

    id: str
    tokens: Tensor
    """[n], int64."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How far one part of the live model is from the reference."""

    part: str
    files: str
    """What the checkpoint's tensors of this part are called; "" where it has none of its own."""
    error: float
    """The worst token's error, relative to the norm of what the part adds."""
    share: float
    """Of what is allowed, for all tokens together or the worst one; more than 1 is a failure."""
    compared: int
    """Tokens."""
    ties: int = 0
    """Tokens to which rounding gave other experts than the reference's."""
    where: str = ""
    """The worst token."""

    @property
    def ok(self) -> bool:
        """Whether it is within bounds; NaN is not."""
        return self.share <= 1


@dataclass(frozen=True, slots=True)
class Report:
    """All parts in the order of computation, the losses last."""

    directory: str
    differences: Sequence[Difference]
    logits_error: float
    """Of the main logits with both models run from the tokens on: norm over norm."""

    @property
    def problem(self) -> str:
        """What is wrong, the first part first; "" where nothing is."""
        wrong = [difference for difference in self.differences if not difference.ok]
        if not wrong:
            return ""
        first, *others = wrong
        text = f"the model differs from transformers' on {self.directory}, first in {first.part}"
        text += f" ({first.files}): " if first.files else ": "
        text += f"relative error {first.error:.1e}, {first.share:.3g} times what is allowed"
        text += f", at {first.where}" if first.where else ""
        if others:
            text += "; also in " + ", ".join(other.part for other in others)
        return text + "; do the files belong to the job's model, and does this layout compute it?"


def compare(
    layers: HFLayers,
    live: Gathered,
    documents: Sequence[Document],
    *,
    losses: tuple[float, float | None],
    num_mtp: int,
    tolerance: Tolerance,
) -> Report:
    """Runs the reference one part at a time, on this process alone.

    Args:
        layers: The reference.
        live: What the model gave; emptied on the way.
        documents: In the order of the live model's tags.
        losses: Of the live model: main, and MTP's mean over depths (None: no MTP); every token of
            the documents counted.
        num_mtp: MTP layers of the live model.
        tolerance: Of the live model's format.
    """
    walk = _Walk(layers, live, documents, tolerance)
    walk.embedding()
    for index in range(layers.num_layers):
        walk.decoder_layer(index)
    walk.final_norm()
    head = layers.head()
    reference = [walk.logits(0, head)]
    for depth in range(num_mtp):
        del head  # one part at a time: an MTP layer is as large as a decoder layer
        walk.mtp_layer(depth)
        head = layers.head()
        reference.append(walk.logits(1 + depth, head))
    main, mtp = losses
    walk.loss("loss", main, reference[0])
    if mtp is not None:
        walk.loss("MTP loss", mtp, sum(reference[1:]) / num_mtp)
    return Report(str(layers.reader.directory), walk.differences, walk.logits_error)


@dataclass(frozen=True, slots=True)
class _Choices:
    """Of one document's tokens in one layer, [n] each, bool."""

    ties: Tensor
    """Other experts than the reference's, as rounding may choose."""
    wrong: Tensor
    """Other experts, though the reference's choice is clear."""


@dataclass
class _Walk:
    """Where the comparison stands: hidden states of each document, live and of the reference."""

    layers: HFLayers
    gathered: Gathered
    documents: Sequence[Document]
    tolerance: Tolerance
    differences: list[Difference] = field(default_factory=list)
    live: list[Tensor] = field(default_factory=list)
    """Outputs of the live model's last part."""
    free: list[Tensor] = field(default_factory=list)
    """Outputs of the reference run on its own."""
    logits_error: float = 0.0

    def embedding(self) -> None:
        self.live = self._take(EMBEDDING)
        self.free = [self.layers.embed(document.tokens) for document in self.documents]
        self._compare("embedding", "model.embed_tokens", self.live, self.free)

    def decoder_layer(self, index: int) -> None:
        layer = self.layers.layer(index)
        with self._live_choices(layer.module, choice_key(layer_key(index))) as choices:
            expected = [layer(hidden) for hidden in self.live]
        self.free = [layer(hidden) for hidden in self.free]
        inputs, self.live = self.live, self._take(layer_key(index))
        files = f"model.layers.{index}"
        self._compare(f"layer {index}", files, self.live, expected, inputs=inputs, choices=choices)

    def final_norm(self) -> None:
        norm = self.layers.norm()
        with torch.no_grad():
            self.live = [norm(hidden) for hidden in self.live]
            self.free = [norm(hidden) for hidden in self.free]

    def mtp_layer(self, depth: int) -> None:
        layer, shift = self.layers.mtp_layer(depth), 1 + depth
        # A document's last tokens have no successor to read; nothing looks at what they give.
        embedded = [self.layers.embed(d.tokens[shift:]) for d in self.documents]
        with self._live_choices(layer.module, choice_key(mtp_key(depth))) as choices:
            expected = [layer(e, h[: len(e)]) for e, h in zip(embedded, self.live, strict=True)]
        self.live = [h[:-shift] for h in self._take(mtp_key(depth))]
        files = f"model.layers.{self.layers.num_layers + depth}"
        self._compare(f"MTP layer {depth}", files, self.live, expected, choices=choices)

    @torch.no_grad()
    def logits(self, depth: int, head: nn.Module) -> float:
        """Compares the live logits; returns the mean loss of the reference's."""
        whole = self._take(logits_key(depth))
        live = [logits[: len(h)] for logits, h in zip(whole, self.live, strict=True)]
        losses: list[Tensor] = []

        def expected() -> Iterator[Tensor]:
            for document, hidden in zip(self.documents, self.live, strict=True):
                logits, labels = head(hidden), document.tokens[1 + depth :]
                losses.append(F.cross_entropy(logits[: len(labels)], labels, reduction="none"))
                yield logits

        name, files = ("MTP logits", "lm_head") if depth else ("logits", "model.norm, lm_head")
        self._compare(name, files, live, expected())
        if depth == 0:
            squares = torch.zeros(2, dtype=torch.float64)
            for hidden, ours in zip(self.free, live, strict=True):
                logits = head(hidden)
                pair = torch.stack([(ours - logits).norm(), logits.norm()])
                squares += pair.double().square()
            self.logits_error = float((squares[0] / squares[1]).sqrt())
        return torch.cat(losses).mean().item()

    def loss(self, name: str, live: float, reference: float) -> None:
        error = abs(live - reference) / abs(reference)
        number = sum(len(document.tokens) for document in self.documents)
        share = error / self.tolerance.loss
        self.differences.append(Difference(name, "", error, share, compared=number))

    @contextmanager
    def _live_choices(self, module: nn.Module, key: str) -> Iterator[list[_Choices]]:
        """Lets a layer's router take the live model's experts, a document a run.

        A dense layer has nothing to choose, and gives an empty list.
        """
        found: list[_Choices] = []

        def take(router: Any, args: tuple[Tensor, ...], output: Any) -> Any:
            own = torch.zeros_like(output[0], dtype=torch.bool).scatter(1, output[2], True)
            live = choices[len(found)][: len(own)].bool()
            clear = clear_choice(router, args[0].flatten(0, -2), self.tolerance.router_noise)
            differs = (live != own).any(1)
            found.append(_Choices(ties=differs & ~clear, wrong=differs & clear))
            return _take_choice(router, output, live)

        routers = [m for m in module.modules() if isinstance(m, DeepseekV3TopkRouter)]
        choices = self._take(key) if routers else []
        handles = [router.register_forward_hook(take) for router in routers]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    def _take(self, key: str) -> list[Tensor]:
        lengths = [len(document.tokens) for document in self.documents]
        return list(torch.split(self.gathered.take(key, sum(lengths)).float(), lengths))

    def _compare(
        self,
        part: str,
        files: str,
        live: Sequence[Tensor],
        expected: Iterable[Tensor],
        *,
        inputs: Sequence[Tensor] | None = None,
        choices: Sequence[_Choices] = (),
    ) -> None:
        """Notes the worst token. `inputs`: what the part adds to; `choices`: of its router."""
        # One document at a time: the logits of all are gigabytes.
        norms = []
        for index, (ours, theirs) in enumerate(zip(live, expected, strict=True)):
            update = theirs - inputs[index] if inputs else theirs
            norms.append(torch.stack([t.norm(dim=1) for t in (ours - theirs, update, theirs)]))
        error, size, whole = torch.cat(norms, dim=1)
        allowed = self.tolerance.update * size + self.tolerance.rounding * whole
        shares = error / allowed
        if choices:
            shares[torch.cat([choice.wrong for choice in choices])] = torch.inf
        names = [
            f"sample {document.id}, token {position}"
            for document, rows in zip(self.documents, live, strict=True)
            for position in range(len(rows))
        ]
        worst = int(shares.argmax())
        together = float(shares.square().mean().sqrt())
        self.differences.append(
            Difference(
                part,
                files,
                error=float(error[worst] / size[worst]),
                share=max(together, float(shares[worst]) / OUTLIER),
                compared=len(shares),
                ties=sum(int(choice.ties.sum()) for choice in choices),
                where=names[worst] + ", other experts" * bool(shares[worst].isinf()),
            )
        )


def _take_choice(router: Any, output: tuple[Tensor, ...], live: Tensor) -> tuple[Tensor, ...]:
    """What transformers' router gives, for the experts of the live one: [n, experts], bool."""
    logits, *_ = output
    chosen = live.float().topk(router.top_k, dim=1).indices
    weights = logits.sigmoid().gather(1, chosen)
    if router.norm_topk_prob:
        weights = weights / (weights.sum(dim=1, keepdim=True) + 1e-20)
    return logits, weights * router.routed_scaling_factor, chosen


@torch.no_grad()
def clear_choice(router: Any, hidden: Tensor, noise: float) -> Tensor:
    """Whether a token's experts and groups stay the same under rounding: [n], bool.

    Args:
        router: The reference's.
        hidden: [n, hidden], its input.
        noise: Relative error of each product; a logit's error is that of their sum, as independent.
    """
    weight, bias = router.weight.float(), router.e_score_correction_bias
    scores = (hidden.float() @ weight.T).sigmoid()
    spread = noise * (hidden.float().square() @ weight.square().T).sqrt()
    # Four standard deviations, to first order, and the rounding of score + bias in fp32.
    doubt = 4 * spread * scores * (1 - scores) + 2.0**-22 * bias.abs().max()
    low, high = (
        (scores + bias + sign * doubt).unflatten(1, (router.num_group, -1)) for sign in (-1, 1)
    )
    low_groups, high_groups = (bound.topk(2, dim=-1).values.sum(-1) for bound in (low, high))
    groups = _best(low_groups, router.topk_group)
    closed = ~groups[..., None]
    low, high = (bound.masked_fill(closed, -torch.inf).flatten(1) for bound in (low, high))
    experts = _best(low, router.top_k)
    return _apart(low_groups, high_groups, groups) & _apart(low, high, experts)


def _best(scores: Tensor, number: int) -> Tensor:
    """The `number` largest of each row, as a mask."""
    chosen = scores.topk(number, dim=1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, chosen, True)


def _apart(low: Tensor, high: Tensor, chosen: Tensor) -> Tensor:
    """Whether the least that the chosen may have is more than the most of all others: [n]."""
    least = low.masked_fill(~chosen, torch.inf).amin(1)
    return least > high.masked_fill(chosen, -torch.inf).amax(1)

"""Seconds of one micro-batch in one layer: its kernels, copies and messages as rows, then summed.

A row knows under which `memory.recompute_modules` it is computed again in backward. Work that is
bound by memory counts the bytes that it must move, at the bandwidth reached, times `COPIES`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from megatron_dsv3.plan.kernels import Kernels, Seconds
from megatron_dsv3.plan.links import Links
from megatron_dsv3.plan.records import Workload
from megatron_dsv3.plan.units import cut_of, unit_of

Kind = Literal["compute", "tp", "ep", "cp"]
Unit = Literal["dense", "moe", "mtp", "head"]
KINDS: tuple[Kind, ...] = ("compute", "tp", "ep", "cp")
COPIES = 2.1
"""Passes over memory for one that is needed: casts, concatenations and gradients that are added.
Fitted to whole steps on an H100."""
FUSED_ROPE, UNFUSED_ROPE = 0.8, 4.5
"""Passes over queries, keys and values to rotate them and lay them out, times `COPIES`."""
LOSS_BYTES = 18.0
"""Moved for a logit in forward; backward moves twice as much."""
UNPACKED = 0.85
"""Attention over a row of one document as unpacked: 5.8 ms against 6.9 (docs/performance.md)."""
PADDED_VALUES = 1.9
"""Slower attention where context parallelism pads values to the keys' width: 12.95 ms against 6.88
(docs/performance.md)."""
LINK_SHARE = 0.5
"""Of the link to host memory, for activations: all GPUs of a node copy at once, a group of tensors
at a time, into the same memory. Assumed."""
LINK_SHARE_ALONE = 0.85
"""Of a GPU that is alone. Fitted to two jobs on an H100."""
LAUNCH_SECONDS: Mapping[Unit, tuple[float, float]] = {
    "dense": (5e-3, 7e-3), "moe": (10e-3, 14e-3), "mtp": (11e-3, 15e-3), "head": (1e-3, 1e-3),
}  # fmt: skip
"""What the host needs to start the kernels of a unit, forward and backward, with
`LAUNCHED_EXPERTS` on the rank. Fitted to FP8 blocks in one, four and eight micro-batches of 4096
tokens on an H200 with 16 cores (docs/benchmarks.md); hosts with other work take longer."""
LAUNCHED_EXPERTS = 8
EXPERT_LAUNCH_SECONDS: Mapping[Literal["bf16", "fp8"], tuple[float, float]] = {
    "bf16": (0.1e-3, 0.15e-3), "fp8": (0.17e-3, 0.25e-3),
}  # fmt: skip
"""What each further expert of the rank needs, forward and backward: it is quantised and multiplied
by launches of its own. Fitted to 32 experts on the same card."""


@dataclass(frozen=True, slots=True)
class Row:
    """One piece of work of a layer."""

    name: str
    kind: Kind
    seconds: Seconds
    again: frozenset[str] = frozenset()
    """Recompute modules that it is part of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitTime:
    """Seconds of a unit that stages are made of, by kind of work."""

    forward: Mapping[Kind, float]
    backward: Mapping[Kind, float]
    """Recomputation included."""
    rows: tuple[Row, ...] = ()

    def total(self, *, forward: bool) -> float:
        """Of all kinds."""
        return sum((self.forward if forward else self.backward).values())


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """The units of one workload's stages, on one rank."""

    workload: Workload
    kernels: Kernels
    links: Links
    _units: dict[str, UnitTime] = field(default_factory=dict, compare=False, repr=False)

    def unit(self, name: Unit) -> UnitTime:
        """A dense layer, an expert layer, an MTP layer without head, one pass of head and loss."""
        if name not in self._units:
            rows = tuple(self._rows(name))
            alone = _summed(rows, self._again(name), self._launch(name))
            self._units[name] = self._with_offloading(name, alone)
        return self._units[name]

    def _launch(self, name: Unit) -> tuple[float, float]:
        """Seconds of the host, forward and backward."""
        forward, backward = LAUNCH_SECONDS[name]
        if name in ("dense", "head"):
            return forward, backward
        work = self.workload
        further = work.arch.num_experts // work.parallel.ep_size - LAUNCHED_EXPERTS
        each = EXPERT_LAUNCH_SECONDS["bf16" if work.precision.fp8 == "off" else "fp8"]
        return forward + further * each[0], backward + further * each[1]

    def _with_offloading(self, name: Unit, alone: UnitTime) -> UnitTime:
        """Copies to the host run beside a layer's forward, those back beside its backward."""
        work = self.workload
        if name == "head" or not work.memory.offload_activations:
            return alone
        layer = unit_of("dense" if name == "dense" else "moe", work.arch, cut_of(work))
        num_bytes = layer.host * self._tokens
        share = LINK_SHARE if work.world_size > 1 else LINK_SHARE_ALONE
        seconds = num_bytes / (share * self.kernels.card.host_gb_s * 1e9)
        shown = [max(0.0, seconds - alone.total(forward=forward)) for forward in (True, False)]
        origin = f"{num_bytes / 2**20:.0f} MiB each way, less the layer that hides it"
        away = Seconds(shown[0], shown[1], origin)
        row = Row("activations to host memory and back", "compute", away)
        forward, backward = (
            {**times, "compute": times["compute"] + more}
            for times, more in zip((alone.forward, alone.backward), shown, strict=True)
        )
        return UnitTime(forward=forward, backward=backward, rows=(*alone.rows, row))

    def _rows(self, name: Unit) -> Iterator[Row]:
        arch = self.workload.arch
        if name == "head":
            yield from self._head()
            return
        yield from self._attention()
        if name == "dense":
            yield from self._mlp("mlp", arch.ffn_hidden_size, frozenset({"mlp"}))
        else:
            yield from self._experts()
        if name == "mtp":
            width = arch.hidden_size // self.workload.parallel.tp_size
            seconds = self.kernels.product("bf16", self._tokens, width, 2 * arch.hidden_size)
            yield Row("eh_proj", "compute", seconds)
            yield self._copy("MTP norms", 12 * arch.hidden_size * self._share, "layernorm")

    def _again(self, name: Unit) -> frozenset[str] | None:
        """Modules that backward computes again; None: all of the unit."""
        memory = self.workload.memory
        if memory.recompute == "full":
            return frozenset() if name == "head" else None
        return frozenset(memory.recompute_modules if memory.recompute == "selective" else ())

    @property
    def _tokens(self) -> int:
        return self.workload.tokens_per_rank

    @property
    def _share(self) -> float:
        """Tokens between tensor-parallel layers, where the sequence is cut."""
        return self._tokens / self.workload.parallel.tp_size

    def _product(
        self, name: str, tokens: float, n: int, k: int, again: frozenset[str] = frozenset()
    ) -> Row:
        seconds = self.kernels.product(self.workload.precision.fp8, tokens, n, k)
        return Row(name, "compute", seconds, again)

    def _copy(self, name: str, num_bytes: float, *again: str) -> Row:
        """Work that is bound by memory; backward moves twice as much."""
        seconds = COPIES * num_bytes / (self.kernels.card.hbm_gb_s * 1e9)
        origin = f"{num_bytes / 2**20:.0f} MiB x {COPIES} over memory, factor fitted to steps"
        return Row(name, "compute", Seconds(seconds, 2 * seconds, origin), frozenset(again))

    def _gather(self, name: str, num_bytes: float, again: frozenset[str] = frozenset()) -> Row:
        """A gather or reduce-scatter over tensor-parallel ranks, and its mirror in backward.

        Every second one is a gather of inputs, which backward repeats for the weights' gradients.
        """
        seconds = self.links.gather(self.links.tp, num_bytes)
        origin = f"{num_bytes / 2**20:.0f} MiB among {self.links.tp.size} ranks"
        return Row(name, "tp", Seconds(seconds, 1.5 * seconds, origin), again)

    def _attention(self) -> Iterator[Row]:
        work, arch, tokens, share = self.workload, self.workload.arch, self._tokens, self._share
        heads = arch.num_heads // work.parallel.tp_size
        up = frozenset({"mla_up_proj"})
        width = arch.qk_head_dim + arch.qk_rope_head_dim
        kv_down = arch.kv_lora_rank + arch.qk_rope_head_dim
        rank = arch.q_lora_rank
        if rank is None:
            yield self._product("q_proj", tokens, heads * width, arch.hidden_size, up)
        else:
            yield self._product("q_down_proj", share, rank, arch.hidden_size)
            yield self._product("q_up_proj", tokens, heads * width, rank, up)
        yield self._product("kv_down_proj", share, kv_down, arch.hidden_size)
        kv_width = heads * (arch.qk_head_dim + arch.v_head_dim)
        yield self._product("kv_up_proj", tokens, kv_width, arch.kv_lora_rank, up)
        latents = 2.0 * tokens * ((rank or arch.hidden_size) + kv_down)
        yield self._gather("latents", latents)
        passes = FUSED_ROPE if work.kernels.fused_rope else UNFUSED_ROPE
        rotated = passes * 2.0 * tokens * heads * (2 * width + arch.v_head_dim)
        yield self._copy("rotary embedding", rotated, "mla_up_proj")
        yield from self._core_attention(heads, width)
        out_width = heads * arch.v_head_dim
        yield self._product("proj", tokens, arch.hidden_size, out_width)
        yield self._gather("attention's output", 2.0 * tokens * arch.hidden_size)
        yield self._copy("norms", 2 * 4 * share * arch.hidden_size, "layernorm")
        yield self._copy("residuals", 2 * 6 * share * arch.hidden_size)

    def _core_attention(self, heads: int, width: int) -> Iterator[Row]:
        work, arch, tokens = self.workload, self.workload.arch, self._tokens
        again = frozenset({"core_attn"})
        cp_size = work.parallel.cp_size
        seconds = self.kernels.attention(
            tokens=tokens,
            length=min(work.document_length or work.seq_length, work.seq_length),
            heads=heads,
            width=width + arch.v_head_dim,
        )
        alone = work.kernels.dense_single_documents and _one_document_a_row(work)
        factor = PADDED_VALUES if cp_size > 1 else UNPACKED if alone else 1.0
        seconds = Seconds(
            seconds.forward * factor,
            seconds.backward * factor,
            f"{seconds.origin}, x {factor:g} for how values and rows are laid out",
        )
        yield Row("core attention", "compute", seconds, again)
        if cp_size == 1:
            return
        step = self.links.ring_step(self.links.cp, 2.0 * tokens * heads * 2 * width)
        hidden = (cp_size - 1) / cp_size
        # Keys and values of the next part travel while this one is worked on; gradients too.
        forward = max(0.0, (cp_size - 1) * step - hidden * seconds.forward)
        backward = max(0.0, 2 * (cp_size - 1) * step - hidden * seconds.backward)
        origin = (
            f"{cp_size - 1} messages of {step * 1e3:.2f} ms, less the attention that hides them"
        )
        yield Row("keys and values", "cp", Seconds(forward, backward, origin), again)

    def _mlp(self, name: str, width: int, again: frozenset[str]) -> Iterator[Row]:
        arch, tokens = self.workload.arch, self._tokens
        cut = width // self.workload.parallel.tp_size
        yield self._product(f"{name} fc1", tokens, 2 * cut, arch.hidden_size, again)
        yield self._copy(f"{name} swiglu", 2.0 * tokens * 3 * cut, *again)
        yield self._product(f"{name} fc2", tokens, arch.hidden_size, cut, again)
        for message in ("input", "output"):
            yield self._gather(f"{name} {message}", 2.0 * tokens * arch.hidden_size, again)

    def _experts(self) -> Iterator[Row]:
        work, arch, share = self.workload, self.workload.arch, self._share
        parallel, again = work.parallel, frozenset({"moe"})
        width = arch.moe_ffn_hidden_size
        # fp32 products of few columns: about twice their bf16 time.
        router = self.kernels.product("bf16", share, arch.num_experts, arch.hidden_size)
        yield Row("router", "compute", router + router, again)
        yield from self._mlp(
            "shared", arch.num_shared_experts * width, again | frozenset({"shared_experts"})
        )
        sent = share * arch.num_experts_per_token * work.imbalance
        yield self._copy("permute", 2 * 2 * 2.0 * sent * arch.hidden_size, "moe")
        yield self._copy("unpermute", 2 * 2 * 2.0 * sent * arch.hidden_size, "moe")
        got = sent * parallel.etp_size
        local = arch.num_experts // parallel.ep_size
        cut = width // parallel.etp_size
        for name, n, k in (("fc1", 2 * cut, arch.hidden_size), ("fc2", arch.hidden_size, cut)):
            seconds = self.kernels.product(work.precision.fp8, got / local, n, k, groups=local)
            yield Row(f"experts {name}", "compute", seconds, again)
        yield self._copy("experts' swiglu", 2.0 * got * 3 * cut, "moe_act", "moe")
        yield from self._dispatch(sent, again)

    def _dispatch(self, sent: float, again: frozenset[str]) -> Iterator[Row]:
        num_bytes = 2.0 * sent * self.workload.arch.hidden_size
        for name in ("dispatch", "combine"):
            seconds = self.links.exchange(self.links.ep, num_bytes)
            if self.links.etp.size > 1:
                whole = num_bytes * self.links.etp.size
                seconds += self.links.gather(self.links.etp, whole)
            origin = f"{num_bytes / 2**20:.0f} MiB of each of {self.links.ep.size} ranks"
            yield Row(name, "ep", Seconds(seconds, seconds, origin), again)

    def _head(self) -> Iterator[Row]:
        arch, tokens = self.workload.arch, self._tokens
        words = arch.vocab_size // self.workload.parallel.tp_size
        seconds = self.kernels.product("bf16", tokens, words, arch.hidden_size)
        yield Row("head", "compute", seconds)
        # Cast to fp32, largest, difference, exponentials, sum; one kernel reads and writes bf16.
        each = 4.0 if self.workload.kernels.fused_loss else LOSS_BYTES
        yield self._copy("loss", each * tokens * words)
        yield self._gather("head's input", 2.0 * tokens * arch.hidden_size)


def _one_document_a_row(workload: Workload) -> bool:
    length = workload.document_length or workload.seq_length
    return workload.micro_batch_size == 1 and length >= workload.seq_length


def _summed(
    rows: tuple[Row, ...], again: frozenset[str] | None, launch: tuple[float, float]
) -> UnitTime:
    forward = dict.fromkeys(KINDS, 0.0)
    backward = dict.fromkeys(KINDS, 0.0)
    repeated = 0.0
    for row in rows:
        forward[row.kind] += row.seconds.forward
        backward[row.kind] += row.seconds.backward
        if again is None or row.again & again:
            backward[row.kind] += row.seconds.forward
            repeated += row.seconds.forward
    # Messages are started by the host as well, so only what the kernels leave open is added.
    share = repeated / total if (total := sum(forward.values())) else 0.0
    least = (launch[0], launch[1] + launch[0] * share)
    for times, floor in ((forward, least[0]), (backward, least[1])):
        times["compute"] += max(0.0, floor - sum(times.values()))
    return UnitTime(forward=forward, backward=backward, rows=rows)

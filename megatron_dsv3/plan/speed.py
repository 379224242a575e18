"""Seconds of a whole step: chunks on the pipeline's clock, gradients, weights, the update."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.config.counts import count_parameters, flops_per_token
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.config.placement import Stage, place
from megatron_dsv3.plan.kernels import Kernels
from megatron_dsv3.plan.layer_times import KINDS, Kind, LayerTimes, Unit, UnitTime
from megatron_dsv3.plan.links import Links
from megatron_dsv3.plan.records import Cluster, StepTime, Workload
from megatron_dsv3.plan.schedule import Costs, Timeline, simulate

STEP_SECONDS = 0.012
"""Of each step outside all that is counted: gradient norm, weights from masters, what the GPU waits
for at a step's ends. Fitted to steps of one and of four micro-batches on an H200."""
HOST_ADAM_PER_SECOND = 9e9
"""Parameters that a node's processors update in a second: 10 times the 22 ms that a GPU takes for
2e9 (FACTS of `optimizer.offload_fraction`); its GPUs share them."""
HIDDEN = 0.7
"""Share of a pass behind which overlapped gradients or weights can travel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageParameters:
    """Numbers that one rank of a stage holds."""

    common: float
    """Outside the routed experts."""
    experts: float


@dataclass(frozen=True, slots=True)
class Speed:
    """Step times on one cluster."""

    cluster: Cluster
    kernels: Kernels
    _layers: dict[object, LayerTimes] = field(default_factory=dict, compare=False, repr=False)

    def step(self, workload: Workload) -> StepTime:
        """What a step of this workload takes."""
        timeline = self.timeline(workload)
        pace = max(range(workload.parallel.pp_size), key=timeline.busy.__getitem__)
        kinds = self._busy_by_kind(workload, pace)
        data_parallel = self._data_parallel(workload)
        optimizer = self._optimizer(workload)
        total = timeline.seconds + data_parallel + optimizer + STEP_SECONDS
        length = min(workload.document_length or workload.seq_length, workload.seq_length)
        rate = _tokens(workload) / total / workload.world_size
        tflops = rate * flops_per_token(workload.arch, length) / 1e12
        return StepTime(
            compute=kinds["compute"],
            tp=kinds["tp"],
            ep=kinds["ep"],
            cp=kinds["cp"],
            dp=data_parallel,
            bubble=timeline.seconds - sum(kinds.values()),
            optimizer=optimizer + STEP_SECONDS,
            tokens_per_second_per_gpu=rate,
            tflops=tflops,
            mfu=tflops / self.cluster.card.bf16_tflops,
            origins=self._origins(workload),
        )

    def rate_at_most(self, workload: Workload) -> float:
        """Tokens a second and GPU without any bubble: fast to work out, and never too low."""
        busy = [0.0] * workload.parallel.pp_size
        for stage in place(workload.arch, workload.parallel):
            chunk = self._chunk(workload, stage)
            busy[stage.pp_rank] += chunk.total(forward=True) + chunk.total(forward=False)
        seconds = workload.num_micro_batches * max(busy) + self._optimizer(workload)
        return _tokens(workload) / seconds / workload.world_size

    def timeline(self, workload: Workload, *, whole: bool = False) -> Timeline:
        """All stages' forward and backward passes on a clock."""
        parallel, arch = workload.parallel, workload.arch
        times = [self._chunk(workload, stage) for stage in place(arch, parallel)]
        tokens = workload.tokens_per_rank / parallel.tp_size
        links = Links(self.cluster, parallel, workload.world_size)
        return simulate(
            Costs(
                forward=[chunk.total(forward=True) for chunk in times],
                backward=[chunk.total(forward=False) for chunk in times],
                hop=links.hop(2.0 * tokens * arch.hidden_size),
                overlapped_hops=parallel.vpp_size > 1,
            ),
            pp_size=parallel.pp_size,
            vpp_size=parallel.vpp_size,
            num_micro_batches=workload.num_micro_batches,
            whole=whole,
        )

    def units(self, workload: Workload) -> Mapping[Unit, UnitTime]:
        """The kinds of layers that the workload has, with what their times are made of."""
        arch, times = workload.arch, self._times(workload)
        there: dict[Unit, bool] = {
            "dense": arch.num_dense_layers > 0,
            "moe": arch.num_moe_layers > 0,
            "mtp": arch.num_mtp_layers > 0,
            "head": True,
        }
        return {name: times.unit(name) for name, is_there in there.items() if is_there}

    def _times(self, workload: Workload) -> LayerTimes:
        """Units depend on less than the whole workload, and are worked out once."""
        parallel = workload.parallel
        key = (
            parallel.tp_size, parallel.cp_size, parallel.ep_size, parallel.etp_size,
            workload.tokens_per_rank, workload.seq_length, workload.document_length,
            workload.precision, workload.memory, workload.imbalance, workload.arch,
            workload.kernels,
        )  # fmt: skip
        if key not in self._layers:
            links = Links(self.cluster, parallel, workload.world_size)
            self._layers[key] = LayerTimes(workload, self.kernels, links)
        return self._layers[key]

    def _chunk(self, workload: Workload, stage: Stage) -> UnitTime:
        arch, times = workload.arch, self._times(workload)
        numbers: dict[Unit, int] = {
            "dense": sum(not arch.is_moe_layer(layer) for layer in stage.layers),
            "moe": sum(arch.is_moe_layer(layer) for layer in stage.layers),
            "mtp": len(stage.mtp_layers),
            "head": stage.has_loss * (1 + arch.num_mtp_layers),
        }
        units = [(times.unit(name), number) for name, number in numbers.items() if number]
        return UnitTime(
            forward={kind: sum(n * unit.forward[kind] for unit, n in units) for kind in KINDS},
            backward={kind: sum(n * unit.backward[kind] for unit, n in units) for kind in KINDS},
        )

    def _busy_by_kind(self, workload: Workload, pp_rank: int) -> Mapping[Kind, float]:
        """Seconds of a stage, over all micro-batches."""
        stages = place(workload.arch, workload.parallel)
        chunks = [self._chunk(workload, stage) for stage in stages if stage.pp_rank == pp_rank]
        return {
            kind: workload.num_micro_batches
            * sum(chunk.forward[kind] + chunk.backward[kind] for chunk in chunks)
            for kind in KINDS
        }

    def _data_parallel(self, workload: Workload) -> float:
        """Gradients reduced and weights gathered, as far as no pass hides them."""
        links = Links(self.cluster, workload.parallel, workload.world_size)
        optimizer = workload.optimizer
        gradient = 4.0 if optimizer.gradients == "fp32" else 2.0
        weight = 1.0 if workload.precision.fp8_params else 2.0
        reduce = gather = 0.0
        for held in stage_parameters(workload):
            parts = ((links.dp, held.common), (links.edp, held.experts))
            reduce = max(reduce, sum(links.gather(group, gradient * n) for group, n in parts))
            gather = max(gather, sum(links.gather(group, weight * n) for group, n in parts))
        chunks = [self._chunk(workload, s) for s in place(workload.arch, workload.parallel)]
        if optimizer.overlap_grad_reduce:
            behind = min(chunk.total(forward=False) for chunk in chunks)
            reduce = max(0.0, reduce - HIDDEN * behind)
        if optimizer.overlap_param_gather:
            behind = min(chunk.total(forward=True) for chunk in chunks)
            gather = max(0.0, gather - HIDDEN * behind)
        return reduce + gather

    def _optimizer(self, workload: Workload) -> float:
        """The update of this rank's share of masters and moments."""
        parallel, optimizer = workload.parallel, workload.optimizer
        copies = parallel.dp_size(workload.world_size) * parallel.cp_size
        expert_copies = parallel.edp_size(workload.world_size)
        instances = parallel.num_optimizer_instances
        share = max(
            held.common * instances / copies + held.experts * instances / expert_copies
            for held in stage_parameters(workload)
        )
        here, away = share * (1 - optimizer.offload_fraction), share * optimizer.offload_fraction
        on_gpu = self.kernels.adam(parameters=here, moments=optimizer.moments).forward
        on_host = away * self.cluster.gpus_per_node / HOST_ADAM_PER_SECOND
        # fp32 gradients down, bf16 weights up.
        return on_gpu + on_host + away * 6 / (self.cluster.card.host_gb_s * 1e9)

    def _origins(self, workload: Workload) -> dict[str, str]:
        """One line a kind of work."""
        card, network = self.cluster.card, self.cluster.card.sources.get("network", "")
        measured = f"kernels of {self.kernels.source}" + (
            "" if card.measured else f", transferred from {self.kernels.measured_on.name}"
        )
        links = f"NVLink {card.nvlink_gb_s:g} GB/s, network {card.network_gb_s:g} GB/s reached"
        return {
            "compute": f"{measured}; copies by memory bandwidth, their factor fitted to steps",
            "tp": f"alpha-beta: {links}",
            "ep": f"alpha-beta: {links}; {network}",
            "cp": f"alpha-beta: {links}; less attention",
            "dp": f"alpha-beta: {links}",
            "bubble": "the schedule, simulated pass by pass",
            "optimizer": "Adam of the kernel table, by parameters; host: 9e9 parameters/s a node",
            "mfu": f"over {card.bf16_tflops:g} TFLOP/s on paper",
        }


def _tokens(workload: Workload) -> int:
    """Of a step, over all ranks."""
    rows = workload.num_micro_batches * workload.micro_batch_size
    return rows * workload.seq_length * workload.parallel.dp_size(workload.world_size)


def stage_parameters(workload: Workload) -> Sequence[StageParameters]:
    """What one rank of each pipeline stage holds, in closed form."""
    return _stage_parameters(workload.arch, workload.parallel)


@functools.cache
def _stage_parameters(arch: Architecture, parallel: Parallel) -> Sequence[StageParameters]:
    held = []
    for pp_rank in range(parallel.pp_size):
        common = experts = 0.0
        for stage in place(arch, parallel):
            if stage.pp_rank != pp_rank:
                continue
            for layer in (*stage.layers, *([arch.num_layers] * len(stage.mtp_layers))):
                unit = _layer_parameters(arch, moe=arch.is_moe_layer(layer))
                common, experts = common + unit.common, experts + unit.experts
            vocabulary = arch.vocab_size * arch.hidden_size
            ends = stage.has_embedding + stage.has_loss
            # MTP apart from the embedding holds one of its own.
            ends += bool(stage.mtp_layers) and not stage.has_embedding
            common += ends * vocabulary
            common += len(stage.mtp_layers) * 2 * arch.hidden_size**2
        held.append(
            StageParameters(
                common=common / parallel.tp_size,
                experts=experts / (parallel.ep_size * parallel.etp_size),
            )
        )
    return held


@functools.cache
def _layer_parameters(arch: Architecture, *, moe: bool) -> StageParameters:
    one = replace(arch, num_layers=1, num_dense_layers=0 if moe else 1, num_mtp_layers=0)
    counts = count_parameters(one)
    common = counts.total - counts.routed_experts - counts.embedding - counts.output
    return StageParameters(common=float(common), experts=float(counts.routed_experts))

"""`megatron-dsv3 plan search`: which layouts fit, which is fastest, and the job of the best."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from megatron_dsv3.commands import examples
from megatron_dsv3.commands.plan_explain import explain
from megatron_dsv3.config.architecture import DEEPSEEK_V3, Architecture
from megatron_dsv3.plan import search as engine
from megatron_dsv3.plan.costs import costs
from megatron_dsv3.plan.job_files import Inputs, write_files
from megatron_dsv3.plan.kernels import Kernels, load_kernels
from megatron_dsv3.plan.layouts import Precision, Request
from megatron_dsv3.plan.pictures import draw_memory, draw_timeline
from megatron_dsv3.plan.records import GIB, Cluster, Plan, StepTime, Workload
from megatron_dsv3.plan.search import Found, MemoryModel, Result
from megatron_dsv3.plan.speed import Speed

PARTS = ("compute", "tp", "ep", "cp", "dp", "bubble", "optimizer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a user asks for, apart from the cluster and the layouts."""

    model: Path | None = None
    nodes: int | None = None
    """None: the fewest that work."""
    seq_length: int = 4096
    document_length: int | None = None
    num_samples: int = 100_000
    num_epochs: int = 1
    global_batch_size: int | None = None
    precisions: tuple[Precision, ...] = ("bf16", "fp8")
    states: tuple[str, ...]
    recompute: tuple[str, ...]
    imbalance: float = 1.2
    spare_gib: float = 3.0
    top: int = 8
    explain: bool = False
    kernels: Path | None = None
    write: Path | None = None
    data: Path | None = None
    out: Path | None = None


def run(
    options: Options, cluster: Cluster, console: Console, *, exact: MemoryModel | None = None
) -> None:
    """Searches, shows, and writes what is asked for.

    Args:
        options: What is asked.
        cluster: Where it would run.
        console: For everything.
        exact: Counts memory on the model itself; None: the closed form is trusted.

    Raises:
        ValueError: Nothing fits, or the files cannot be written.
    """
    inputs = _inputs(options)
    arch = DEEPSEEK_V3 if options.model is None else Architecture.from_hf(options.model)
    kernels = load_kernels(cluster.card, options.kernels)
    request = _request(options, arch, cluster)
    with _bar(console) as on_progress:
        result = engine.search(
            request, kernels, top=options.top, exact=exact, on_progress=on_progress
        )
    _show(result, options, console)
    if options.explain:
        best = result.found[0]
        explain(best.plan, Speed(cluster, kernels), console, counted=best.counted)
    if options.write is not None and inputs is not None:
        plan = result.found[0].plan
        for path in (*write_files(plan, inputs, options.write), *_pictures(plan, kernels, options)):
            tell(console, f"wrote {path}")


def _request(options: Options, arch: Architecture, cluster: Cluster) -> Request:
    precisions = options.precisions
    if cluster.card.fp8_tflops is None:
        precisions = tuple(name for name in precisions if name != "fp8")
    if not precisions:
        raise ValueError(f"{cluster.card.name} has no FP8; give --precision bf16")
    request = Request(
        arch=arch,
        cluster=cluster,
        nodes=options.nodes or 1,
        seq_length=options.seq_length,
        document_length=options.document_length,
        global_batch_size=options.global_batch_size,
        precisions=precisions,
        states=options.states,
        recompute=options.recompute,
        imbalance=options.imbalance,
        spare_gib=options.spare_gib,
    )
    if options.seq_length > arch.max_position_embeddings:
        raise ValueError(
            f"--seq-length {options.seq_length} exceeds the model's max_position_embeddings "
            f"{arch.max_position_embeddings}; lower it"
        )
    if options.nodes is not None:
        return request
    fewest = engine.fewest_nodes(request)
    if fewest is None:
        raise ValueError(
            f"no number of nodes up to {engine.MOST_NODES} holds the model at "
            f"{options.seq_length} tokens with what is allowed; allow more, or a larger card"
        )
    return replace(request, nodes=fewest)


def _inputs(options: Options) -> Inputs | None:
    """What the files need; asked for before anything is searched."""
    if options.write is None:
        return None
    wanted = {"--model": options.model, "--data": options.data, "--out": options.out}
    if missing := [name for name, value in wanted.items() if value is None]:
        raise ValueError(
            f"--write needs {', '.join(missing)} as well: the job must know its model, its data "
            "and where the result goes"
        )
    assert options.model is not None
    assert options.data is not None
    assert options.out is not None
    if options.write.exists() and any(options.write.iterdir()):
        raise ValueError(f"--write {options.write}: not empty; name another directory")
    if not options.data.exists():
        raise ValueError(f"--data {options.data}: no such file or directory")
    return Inputs(
        hf_dir=options.model.absolute(),
        data=options.data.absolute(),
        is_store=(options.data / "manifest.json").is_file(),
        out=options.out.absolute(),
        launcher=examples.home() / "examples" / "train_dsv3_671b.sh",
        num_epochs=options.num_epochs,
    )


def _pictures(plan: Plan, kernels: Kernels, options: Options) -> list[Path]:
    assert options.write is not None
    memory, clock = options.write / "memory.png", options.write / "timeline.png"
    draw_memory(plan, memory)
    draw_timeline(Speed(plan.cluster, kernels).timeline(plan.workload), clock)
    return [memory, clock]


@contextmanager
def _bar(console: Console) -> Iterator[engine.Progress]:
    columns = (TextColumn("layouts"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("layouts", total=None)

        def advance(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield advance


def _show(result: Result, options: Options, console: Console) -> None:
    best = result.found[0]
    plan, cluster = best.plan, best.plan.cluster
    nodes = plan.workload.world_size // cluster.gpus_per_node
    tell(
        console,
        f"{nodes} nodes of {cluster.gpus_per_node} x {cluster.card.name}, rows of "
        f"{plan.workload.seq_length:,} tokens: {result.num_fitting:,} of {result.num_layouts:,} "
        "layouts fit",
    )
    console.print(_layout_table(result.found))
    console.print(_memory_table(plan, counted=best.counted))
    step = plan.step
    shares = {part: getattr(step, part) / step.total for part in PARTS}
    named = ", ".join(f"{part} {share:.0%}" for part, share in shares.items() if share >= 0.005)
    work = plan.workload
    batch = work.micro_batch_size * work.num_micro_batches * work.parallel.dp_size(work.world_size)
    tell(
        console,
        f"a step of layout 1: {batch} rows in {step.total:.1f} s, micro-batches of "
        f"{work.micro_batch_size}, {step.tflops:.0f} TFLOP/s a GPU; {named}",
    )
    for index, other in enumerate(result.found[1:], start=2):
        tell(console, f"{index}: {why_slower(other.plan.step, plan.step)}")
    if missed := result.missed:
        tell(
            console,
            f"{layout_text(missed.workload)} with recompute {missed.recompute} would be "
            f"{missed.faster:.0%} faster but lacks {missed.lacks_gib:.1f} GiB a card",
        )
    total = costs(plan, num_samples=options.num_samples, num_epochs=options.num_epochs)
    time = f"{total.days:.1f} days" if total.days >= 2 else f"{total.days * 24:.1f} hours"
    tell(
        console,
        f"{options.num_samples:,} samples x {options.num_epochs}: {total.num_steps:,} steps, "
        f"{time}; a checkpoint {total.checkpoint_tb:.1f} TB, disk "
        f"{total.disk_tb:.1f} TB; host memory {total.host_gib:,.0f} GiB a node "
        f"of {cluster.host_memory_gib:,.0f}",
    )
    if plan.workload.memory.offload_activations:
        tell(
            console,
            "activations in host memory: projected, no speed was measured",
        )
    if not cluster.card.measured:
        tell(console, f"nothing was measured on {cluster.card.name}: speeds are projected")


def _layout_table(found: Sequence[Found]) -> Table:
    table = Table("", box=SIMPLE, padding=(0, 1))
    table.add_column("layout", no_wrap=True)
    table.add_column("recompute, states, products")
    # Tokens a second and GPU; GiB.
    for name in ("tok/s", "MFU", "spare"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, one in enumerate(found, start=1):
        step = one.plan.step
        table.add_row(
            *(str(number), layout_text(one.plan.workload)),
            choices_text(one),
            *(f"{step.tokens_per_second_per_gpu:,.0f}", f"{step.mfu:.1%}"),
            f"{one.plan.spare_gib:.1f}",
        )
    return table


def choices_text(found: Found) -> str:
    """What a layout computes again, how it keeps its states, and what it multiplies in."""
    # FP8 weights are multiplied as they are.
    products = "" if found.plan.workload.precision.fp8_params else f", {found.precision}"
    return f"{found.recompute}, {found.states}{products}"


def layout_text(workload: Workload) -> str:
    """The grid in one word a kind; kinds of size 1 are left out."""
    parallel = workload.parallel
    sizes = {
        "TP": parallel.tp_size, "PP": parallel.pp_size, "VPP": parallel.vpp_size,
        "EP": parallel.ep_size, "ETP": parallel.etp_size, "CP": parallel.cp_size,
    }  # fmt: skip
    return " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1)


def _memory_table(plan: Plan, *, counted: bool) -> Table:
    how = "counted on the model" if counted else "in closed form"
    table = Table("stage", title=f"GiB a card, {how}", box=SIMPLE, padding=(0, 1))
    for name in ("weights", "grads", "optimizer", "activations", "other", "total"):
        table.add_column(name, justify="right")
    table.add_column("chunks")
    for stage in plan.stages:
        states = stage.states
        weights = states.weights + states.caches
        sizes = (weights, states.gradients, states.optimizer, stage.activations.total)
        other = stage.buffers + stage.fragmentation
        cells = [f"{size / GIB:.1f}" for size in (*sizes, other, stage.total)]
        table.add_row(str(stage.pp_rank), *cells, stage.letters)
    return table


def why_slower(other: StepTime, best: StepTime) -> str:
    """What costs the other more a token than the best, the largest first."""
    rate = other.tokens_per_second_per_gpu / best.tokens_per_second_per_gpu
    # By token: batches may differ.
    mine = {part: getattr(other, part) / other.total / rate for part in PARTS}
    differences = {part: mine[part] - getattr(best, part) / best.total for part in PARTS}
    causes = sorted(differences.items(), key=lambda pair: -pair[1])
    named = [f"{part} +{more:.0%}" for part, more in causes[:2] if more >= 0.005]
    return f"{1 / rate - 1:.1%} more time a token" + (f": {', '.join(named)}" if named else "")


def tell(console: Console, line: str) -> None:
    """One line, as it is."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)

"""The `plan` commands' arguments; what they do is imported when one runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

if TYPE_CHECKING:
    from megatron_dsv3.plan.records import Cluster, StageMemory, Workload

plan = typer.Typer(
    help="What fits, how fast, on how many GPUs; without a GPU.", no_args_is_help=True
)

Card = Annotated[str, typer.Option("--gpu", help="Name of a card, or a YAML file of one.")]
NetworkName = Annotated[
    str | None,
    typer.Option(help="Name of a network, or a YAML file; by default the card's usual one."),
]
PrecisionChoice = Literal["any", "bf16", "fp8"]


@plan.command("search")
def search(
    model: Annotated[
        Path | None,
        typer.Option(help="Hugging Face directory; by default DeepSeek-V3, 671B."),
    ] = None,
    nodes: Annotated[int | None, typer.Option(help="Machines.", min=1)] = None,
    min_gpus: Annotated[
        bool, typer.Option("--min-gpus", help="Find the fewest machines that work.")
    ] = False,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of a machine.", min=1)] = 8,
    gpu: Card = "h100-80gb",
    network: NetworkName = None,
    host_memory: Annotated[str, typer.Option(help="Of a machine, as 2TB or 1500GB.")] = "2TB",
    seq_length: Annotated[int, typer.Option(help="Tokens of a row.", min=1)] = 32768,
    document_length: Annotated[
        int | None,
        typer.Option(help="Tokens of a typical sample; by default a row is one.", min=1),
    ] = None,
    samples: Annotated[int, typer.Option(help="Of the data set.", min=1)] = 100_000,
    epochs: Annotated[int, typer.Option(help="Passes over them.", min=1)] = 1,
    global_batch_size: Annotated[
        int | None, typer.Option(help="Rows a step; by default about 4M tokens.", min=1)
    ] = None,
    precision: Annotated[PrecisionChoice, typer.Option(help="Of the layers' products.")] = "any",
    moments: Annotated[
        Literal["any", "fp32", "bf16"], typer.Option(help="Of the optimizer.")
    ] = "any",
    offload: Annotated[bool, typer.Option(help="Allow optimizer states in host memory.")] = True,
    offload_activations: Annotated[
        bool,
        typer.Option("--offload-activations", help="Allow the experts' inputs in host memory."),
    ] = False,
    bf16_gradients: Annotated[
        bool, typer.Option("--bf16-gradients", help="Allow sums of gradients in bf16.")
    ] = False,
    imbalance: Annotated[
        float, typer.Option(help="Tokens of the busiest rank's experts, over the mean.", min=1)
    ] = 1.2,
    spare: Annotated[float, typer.Option(help="GiB of each card to leave free.", min=0)] = 3.0,
    top: Annotated[int, typer.Option(help="Layouts to show.", min=1)] = 6,
    count: Annotated[
        bool, typer.Option(help="Count the memory of the best on the whole model's stages.")
    ] = True,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say where every number is from.")
    ] = False,
    kernels: Annotated[
        Path | None, typer.Option(help="Table of benchmarks/gemm_table.py of your card.")
    ] = None,
    write: Annotated[
        Path | None, typer.Option(help="Directory for job, placement, slurm script and pictures.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="With --write: store or chat files to train on.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="With --write: where training writes the model.")
    ] = None,
) -> None:
    """All layouts that fit, best first; why others lose; the job of the best."""
    if (nodes is None) == (not min_gpus):
        raise ValueError("give one of --nodes N and --min-gpus")
    from megatron_dsv3.commands import plan_search as command
    from megatron_dsv3.plan.layouts import allowed_recompute, allowed_states

    cluster = _cluster(gpu, network, gpus_per_node, host_memory)
    options = command.Options(
        model=model,
        nodes=nodes,
        seq_length=seq_length,
        document_length=document_length,
        num_samples=samples,
        num_epochs=epochs,
        global_batch_size=global_batch_size,
        precisions=("bf16", "fp8") if precision == "any" else (precision,),
        states=allowed_states(moments=moments, offload=offload, bf16_gradients=bf16_gradients),
        recompute=allowed_recompute(offload_activations=offload_activations),
        imbalance=imbalance,
        spare_gib=spare,
        top=top,
        explain=explain,
        kernels=kernels,
        write=write,
        data=data,
        out=out,
    )
    command.run(options, cluster, Console(), exact=_counted if count else None)


def _counted(workload: "Workload") -> Sequence["StageMemory"]:
    from megatron_dsv3.plan.memory import count_memory
    from megatron_dsv3.train.optimizer import build_optimizer

    return count_memory(workload, build_optimizer)


JobFile = Annotated[Path, typer.Argument(help="Job file (YAML).", show_default=False)]
Gpus = Annotated[int, typer.Option(help="Processes, one a GPU.", min=1, show_default=False)]
GpusPerNode = Annotated[int, typer.Option(help="GPUs of a machine.", min=1)]
HostMemory = Annotated[str, typer.Option(help="Of a machine, as 2TB or 1500GB.")]
ModelName = Annotated[
    str | None,
    typer.Option(help="Hugging Face directory, or deepseek-v3; by default the job's."),
]
DocumentLength = Annotated[
    int | None, typer.Option(help="Tokens of a typical sample; by default a row is one.", min=1)
]
Imbalance = Annotated[
    float, typer.Option(help="Tokens of the busiest rank's experts, over the mean.", min=1)
]
Samples = Annotated[int, typer.Option(help="Of the data set.", min=1)]
KernelTable = Annotated[
    Path | None, typer.Option(help="Table of benchmarks/gemm_table.py of your card.")
]


@plan.command("show")
def show(
    job: JobFile,
    gpus: Gpus,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Settings that replace the file's: section.name=value ..."),
    ] = None,
    model: ModelName = None,
    gpu: Card = "h100-80gb",
    network: NetworkName = None,
    gpus_per_node: GpusPerNode = 8,
    host_memory: HostMemory = "2TB",
    document_length: DocumentLength = None,
    imbalance: Imbalance = 1.2,
    samples: Samples = 100_000,
    kernels: KernelTable = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say where every number is from.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File to write the figures to.")
    ] = None,
) -> None:
    """Memory of every stage and time of a step of a job; counted on the model, without a GPU."""
    from megatron_dsv3.commands import plan_show as command
    from megatron_dsv3.config.job import load_job

    question = command.Question(
        job=load_job(job, overrides or []),
        world_size=gpus,
        cluster=_cluster(gpu, network, gpus_per_node, host_memory),
        model=model,
        document_length=document_length,
        imbalance=imbalance,
        kernels=kernels,
        num_samples=samples,
    )
    command.show(question, Console(), origins=explain, json_file=json_file)


@plan.command("compare")
def compare(
    first: JobFile,
    second: JobFile,
    gpus: Gpus,
    model: ModelName = None,
    gpu: Card = "h100-80gb",
    network: NetworkName = None,
    gpus_per_node: GpusPerNode = 8,
    host_memory: HostMemory = "2TB",
    document_length: DocumentLength = None,
    imbalance: Imbalance = 1.2,
    samples: Samples = 100_000,
    kernels: KernelTable = None,
) -> None:
    """Two jobs on the same GPUs side by side."""
    from megatron_dsv3.commands import plan_show as command
    from megatron_dsv3.config.job import load_job

    questions = [
        command.Question(
            job=load_job(path),
            world_size=gpus,
            cluster=_cluster(gpu, network, gpus_per_node, host_memory),
            model=model,
            document_length=document_length,
            imbalance=imbalance,
            kernels=kernels,
            num_samples=samples,
        )
        for path in (first, second)
    ]
    command.compare(questions, Console(), names=[str(first), str(second)])


def _cluster(gpu: str, network: str | None, gpus_per_node: int, host_memory: str) -> "Cluster":
    from megatron_dsv3.commands.convert import parse_size
    from megatron_dsv3.plan.cards import cluster_of
    from megatron_dsv3.plan.records import GIB

    return cluster_of(
        gpu,
        network=network,
        gpus_per_node=gpus_per_node,
        host_memory_gib=parse_size(host_memory) / GIB,
    )

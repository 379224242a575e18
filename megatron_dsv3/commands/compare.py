"""`megatron-dsv3 verify A B`: do two checkpoints hold the same model?"""

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn
from rich.table import Table

from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.convert.compare import Comparison, Difference, WholeHF, WithCopies, compare
from megatron_dsv3.convert.hf_index import listed
from megatron_dsv3.convert.mapping import exported_copies
from megatron_dsv3.convert.megatron_io import INDEX
from megatron_dsv3.convert.sources import MegatronSource, Source


def run(a: Path, b: Path, console: Console, *, tolerance: float, workers: int) -> bool:
    """Compares, prints what was found, and says whether nothing is beyond the tolerance.

    Raises:
        ValueError: One of them is not one whole checkpoint.
    """
    sources = [open_checkpoint(path, config_from=other) for path, other in ((a, b), (b, a))]
    total = sum(info.nbytes // info.dtype.itemsize for info in sources[0].infos().values())
    with Progress(
        "comparing", BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), console=console
    ) as bar:
        task = bar.add_task("", total=total)
        found = compare(*sources, workers=workers, progress=lambda n: bar.advance(task, n))
    console.print(_table(found))
    passed = found.is_within(tolerance)
    verdict = "the same, bit for bit" if found.is_equal else f"within {tolerance}"
    console.print(f"{a} and {b}: {verdict if passed else 'differ'}", highlight=False)
    return passed


def open_checkpoint(path: Path, *, config_from: Path) -> Source:
    """All tensors of a checkpoint of either kind, under Hugging Face's names, copies included.

    Args:
        path: A Hugging Face directory, or a Megatron checkpoint: that has a `.metadata` in it.
        config_from: Where a config.json is, if a Megatron checkpoint has none.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: no such directory; expected a checkpoint")
    if not (path / INDEX).exists():
        return WholeHF(path)
    places = [place for place in (path, config_from) if (place / "config.json").exists()]
    if not places:
        raise ValueError(
            f"{path}: without a config.json nothing says which model it holds; copy that model's "
            f"config.json into it"
        )
    arch = Architecture.from_hf(places[0])
    return WithCopies(MegatronSource.open(path, arch, source="weights"), exported_copies(arch))


def _table(found: Comparison) -> Table:
    table = Table(show_header=False)
    elements = sum(difference.num_different for difference in found.differences)
    table.add_row("tensors in both", f"{found.num_tensors:,} ({found.numel:,} elements)")
    table.add_row("tensors that differ", f"{len(found.differences):,} ({elements:,} elements)")
    lists = {"only in A": found.only_a, "only in B": found.only_b, "of two shapes": found.shapes}
    for what, names in lists.items():
        if names:
            table.add_row(what, listed("tensors", names))
    if found.differences:
        table.add_row("first difference", _place(found.differences[0]))
    if (worst := found.worst) is not None:
        table.add_row("worst relative error", f"{worst.relative_error:.2e} {worst.name}")
    return table


def _place(difference: Difference) -> str:
    first = difference.first
    index = ", ".join(map(str, first.index))
    return f"{difference.name}[{index}]: {first.a!r} against {first.b!r}"

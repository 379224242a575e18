"""`megatron-dsv3 preflight --local`: what this machine brings to a job."""

from rich.console import Console
from rich.table import Table

from megatron_dsv3.launch.local import local_facts


def run_local(console: Console) -> None:
    """Shows it; what may be in the way stands beside it."""
    table = Table()
    for heading in ("", "found", "note"):
        table.add_column(heading, overflow="fold")
    for fact in local_facts():
        table.add_row(fact.what, fact.value, fact.warning or "")
    console.print(table)

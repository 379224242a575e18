"""Convert a DeepSeek-V3 checkpoint of any size on a machine without a GPU.

    python tools/checkpoint/convert.py --to megatron --from HF_DIR --out DIR

Killed and started again with the same arguments it goes on. Several machines share the work with
--node-rank and --num-nodes, or under srun without them.
"""

import argparse
from pathlib import Path

from rich.console import Console

from megatron_dsv3.cli import user_errors
from megatron_dsv3.commands.convert import (
    DEFAULT_MAX_MEMORY,
    Resources,
    parse_size,
    run,
    share_of,
)
from megatron_dsv3.convert.memory import Budget
from megatron_dsv3.convert.offline import Direction


def main() -> None:
    """Converts what is named on the command line."""
    arguments = _parser().parse_args()
    with user_errors():
        resources = Resources(
            budget=Budget(parse_size(arguments.max_memory), arguments.workers),
            share=share_of(arguments.node_rank, arguments.num_nodes),
            finalize=arguments.finalize,
        )
        run(_direction(arguments), arguments.out, resources, Console())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--to", choices=["megatron"], required=True)
    add("--from", dest="source", type=Path, required=True, help="checkpoint to read")
    add("--out", type=Path, required=True, help="directory to write; absent, empty or begun before")
    add(
        "--max-memory",
        default=DEFAULT_MAX_MEMORY,
        help="cap for all processes (default %(default)s)",
    )
    add("--workers", type=int, default=2, help="processes (default %(default)s)")
    add("--node-rank", type=int, help="which of the machines this is, from 0")
    add("--num-nodes", type=int, help="how many machines share the work")
    add("--finalize", action="store_true", help="all machines have ended: complete the target")
    return parser


def _direction(arguments: argparse.Namespace) -> Direction:
    from megatron_dsv3.convert.megatron_write import ToMegatron

    return ToMegatron.open(arguments.source)


if __name__ == "__main__":
    main()

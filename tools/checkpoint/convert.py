"""Convert a DeepSeek-V3 checkpoint of any size on a machine without a GPU.

    python tools/checkpoint/convert.py --to megatron --from HF_DIR --out DIR
    python tools/checkpoint/convert.py --to hf --from CHECKPOINT --out DIR --dtype fp8

Killed and started again with the same arguments it goes on. Several machines share the work with
--node-rank and --num-nodes, or under srun without them.
"""

import argparse
from pathlib import Path

from rich.console import Console

from megatron_dsv3.cli import user_errors
from megatron_dsv3.commands import convert
from megatron_dsv3.convert.journal import check_place
from megatron_dsv3.convert.memory import PeakMeter


def main() -> None:
    """Converts what is named on the command line."""
    arguments = _parser().parse_args()
    with user_errors(), PeakMeter() as memory:
        resources = convert.resources(
            max_memory=arguments.max_memory,
            workers=arguments.workers,
            node_rank=arguments.node_rank,
            num_nodes=arguments.num_nodes,
            finalize=arguments.finalize,
        )
        check_place(arguments.out)
        convert.run(_direction(arguments), arguments.out, resources, Console(), memory)


def _direction(arguments: argparse.Namespace) -> convert.Direction:
    hf_options = {
        "source": arguments.source,
        "dtype": arguments.dtype,
        "shard_size": arguments.shard_size,
        "template": arguments.hf_template,
        "scales_from": arguments.scales_from,
    }
    if arguments.to == "megatron":
        if surplus := [name for name, value in hf_options.items() if value is not None]:
            raise ValueError(f"--to megatron: {', '.join(surplus)} belong to --to hf")
        if arguments.place is None:
            raise ValueError("--to megatron: expected --from HF_DIR")
        return convert.to_megatron(arguments.place)
    return convert.to_hf(arguments.place, arguments.from_xtuner, **hf_options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--to", choices=["megatron", "hf"], required=True)
    place = parser.add_mutually_exclusive_group(required=True).add_argument
    place("--from", dest="place", type=Path, help="checkpoint directory to read")
    place("--from-xtuner", type=Path, metavar="FILE", help="XTuner's consolidated state dict")
    add("--out", type=Path, required=True, help="directory to write; absent, empty or begun before")
    add("--max-memory", default="4GB", help="cap for all processes (default %(default)s)")
    add("--workers", type=int, default=2, help="processes (default %(default)s)")
    add("--node-rank", type=int, help="which of the machines this is, from 0")
    add("--num-nodes", type=int, help="how many machines share the work")
    add("--finalize", action="store_true", help="all machines have ended: complete the target")
    hf = parser.add_argument_group("--to hf").add_argument
    hf(
        "--source",
        choices=["weights", "master"],
        help="bf16 weights or the optimizer's fp32 masters",
    )
    hf("--dtype", choices=["bf16", "fp8"], help="bf16 if not given")
    hf("--shard-size", metavar="SIZE", help="largest file, 5GB if not given")
    hf("--hf-template", type=Path, metavar="DIR", help="whose config and tokenizer are taken over")
    hf("--scales-from", type=Path, metavar="DIR", help="FP8 checkpoint: untouched blocks stay")
    return parser


if __name__ == "__main__":
    main()

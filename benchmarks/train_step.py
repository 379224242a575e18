"""The training step on one GPU beside raw Megatron-Core and transformers, in one run on one card.

    python benchmarks/train_step.py [--only NAME ...] [--steps 10] [--profile NAME] [--json FILE]

The cases of `megatron-dsv3 bench`, and its peers. All take the same slice of DeepSeek-V3 (its
widths; 1 dense and 2 MoE layers, 8 experts), the same tokens a step, AdamW and clipping. Peers: a
plain loop over Megatron-Core's GPTModel with its own specs and defaults, and transformers'
DeepseekV3ForCausalLM with grouped_mm and SDPA. TFLOP/s count the model's FLOPs with causal
attention.
"""

import argparse
from pathlib import Path

from peers import mcore_plain, transformers_plain
from rich.console import Console

from megatron_dsv3.commands import bench

PEERS: bench.Runs = {
    "mcore bf16 1x4k": lambda groups, steps: mcore_plain.measure(groups, 1, None, steps),
    "mcore bf16 4x4k": lambda groups, steps: mcore_plain.measure(groups, 4, None, steps),
    "mcore fp8 4x4k": lambda groups, steps: mcore_plain.measure(groups, 4, "blockwise", steps),
    "transformers bf16 4x4k": lambda groups, steps: transformers_plain.measure(groups, 4, steps),
}


def main() -> None:
    """Prints one line a case as it is done, and writes all to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="names, `*` for any part of one")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--profile", nargs="*", default=[], help="cases taken apart by kernel")
    parser.add_argument("--limit-gib", type=float, default=None, help="as on a smaller card")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--picture", type=Path, default=None)
    request = bench.Request(**vars(parser.parse_args()))
    bench.run(request, Console(width=120), peers=PEERS)


if __name__ == "__main__":
    main()

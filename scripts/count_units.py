"""Writes the counted units of the 671B that `plan search` asks for; run it when the model changes.

    python scripts/count_units.py

Takes a minute. `tests/test_plan_memory.py` counts some of them anew.
"""

import os
import sys

# Fused kernels are stood in for: there is nothing to compile.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

from megatron_dsv3.config.architecture import DEEPSEEK_V3
from megatron_dsv3.plan import units
from megatron_dsv3.plan.cards import cluster_of
from megatron_dsv3.plan.layouts import Request, layouts


def search_cuts() -> list[units.Cut]:
    """Every way in which the search cuts the model, on worlds from 8 to 128 nodes."""
    cuts: dict[units.Cut, None] = {}
    for nodes in (8, 32, 128):
        for seq_length in (4096, 131072):
            request = Request(
                arch=DEEPSEEK_V3,
                cluster=cluster_of("h100-80gb"),
                nodes=nodes,
                seq_length=seq_length,
                precisions=("bf16", "fp8"),
            )
            for layout in layouts(request):
                cuts[units.cut_of(layout.workload)] = None
    return list(cuts)


if __name__ == "__main__":
    target = os.path.join(os.path.dirname(units.__file__), units.TABLE)
    table = units.to_table(search_cuts(), lambda: print(".", end="", flush=True, file=sys.stderr))
    with open(target, "wb") as file:
        file.write(table)
    print(f"wrote {target}, {len(table):,} bytes")

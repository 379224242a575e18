"""Is a Hugging Face directory one whole DeepSeek-V3? Reads headers, and MTP's copies in full.

    python tools/checkpoint/check.py HF_DIR

Prints what the directory holds; exit code 2 and the list of problems where something is missing,
surplus, wrongly shaped, unscaled, truncated, or a copy that differs from its original.
"""

import argparse
from pathlib import Path

from megatron_dsv3.cli import user_errors
from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.config.counts import count_parameters
from megatron_dsv3.convert.hf_io import HFReader


def main() -> None:
    """Checks the directory named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hf_dir", type=Path)
    directory = parser.parse_args().hf_dir
    with user_errors():
        arch = Architecture.from_hf(directory)
        reader = HFReader(directory)
        reader.check_against(arch)
        reader.check_copies(arch)
        counts = count_parameters(arch)
        names = reader.names()
        num_fp8 = sum(reader.is_fp8(name) for name in names)
        print(f"{directory}: whole; {len(names):,} tensors, {num_fp8:,} of them in FP8 blocks")
        print(f"{counts.total:,} parameters, {counts.active:,} active, {counts.mtp:,} for MTP")


if __name__ == "__main__":
    main()

#!/usr/bin/env bash
# Shows what this machine and this image bring, then becomes the command, if one is given.
set -euo pipefail

# Once a node: torchrun's and slurm's processes start containers that are alike.
if [[ ${LOCAL_RANK:-${SLURM_LOCALID:-0}} == 0 ]]; then
    # To standard error: the output belongs to the command.
    megatron-dsv3 preflight --local >&2
fi
if [[ $# -gt 0 ]]; then
    exec "$@"
fi

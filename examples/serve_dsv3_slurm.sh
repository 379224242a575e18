#!/usr/bin/env bash
#SBATCH --job-name=serve-dsv3
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
# Serves an exported DeepSeek-V3 with vLLM on the nodes of a slurm job.
#
#   sbatch examples/serve_dsv3_slurm.sh HF_DIR [option ...]              BF16: 4 nodes, TP8 PP4
#   sbatch --nodes 2 examples/serve_dsv3_slurm.sh HF_DIR [option ...]    FP8: 2 nodes, TP8 PP2
#
#   --tp N             devices that share each layer (8)
#   --pp N             stages (as many as there are nodes)
#   --host ADDRESS     where the first node listens (127.0.0.1: reach it with ssh -L PORT:127.0.0.1:PORT)
#   --port PORT        (8000)
#   --main-port PORT   where the other nodes find the first one (29501)
#   --cli COMMAND      how to call this package (megatron-dsv3)
#   --python PYTHON    of the environment with vLLM, on every node (python3)
#   anything else      goes to `megatron-dsv3 serve run`, and what that does not know to vLLM
#
# Set VLLM_API_KEY to demand a key. The log ends with a curl line once the server answers; scancel
# ends the server on all nodes.
set -euo pipefail

usage() {
    sed -n '/^# Serves/,/^set/{/^#/{s/^# \{0,1\}//;p}}' "$0" >&2
    exit 2
}

[[ $# -ge 1 && $1 != -* ]] || usage
: "${SLURM_JOB_NODELIST:?is not set; start this script with sbatch}"
hf_dir=$1
shift
tp=8 pp=$SLURM_JOB_NUM_NODES main_port=29501
cli=(megatron-dsv3) python=python3 rest=()
while [[ $# -gt 0 ]]; do
    case $1 in
    --tp | --pp | --main-port | --cli | --python)
        [[ $# -ge 2 ]] || usage
        case $1 in
        --tp) tp=$2 ;;
        --pp) pp=$2 ;;
        --main-port) main_port=$2 ;;
        --cli) read -ra cli <<<"$2" ;;
        --python) python=$2 ;;
        esac
        shift 2
        ;;
    *)
        rest+=("$1")
        shift
        ;;
    esac
done
read -r main < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

# scancel signals the processes of the step; a signal to this script alone is passed on.
end() {
    trap - TERM INT
    kill -TERM "$step" 2>/dev/null || true
    wait "$step" || true
    exit 0
}
trap end TERM INT

# The rank is known on the node only. When one node's server ends, those of the others follow.
# shellcheck disable=SC2016
srun --ntasks-per-node=1 --kill-on-bad-exit=1 --wait=30 --label \
    bash -c 'exec "$@" --node-rank "$SLURM_NODEID"' _ \
    "${cli[@]}" serve run "$hf_dir" --python "$python" --tp "$tp" --pp "$pp" \
    --nodes "$SLURM_JOB_NUM_NODES" --main-address "$main" --main-port "$main_port" \
    ${rest[@]+"${rest[@]}"} &
step=$!
wait "$step"

#!/usr/bin/env bash
# What a node runs, started by train_dsv3_671b.sh or train_dsv3_pdsh.sh on each of them:
#
#   node.sh PORT PROCESSES LOGS NCCL_ENV PYTHON alone WORDS...          python WORDS..., once; @node: its name
#   node.sh PORT PROCESSES LOGS NCCL_ENV PYTHON ranks HOSTS WORDS...    torchrun WORDS... with PROCESSES ranks
#   node.sh ... rank WORDS...                                           one rank, into its own log
#
# The first of HOSTS (comma-separated) is where ranks meet. SIGUSR1 and SIGTERM go on to the ranks,
# which save and stop; torchrun itself would pass the one on never and kill 30 s after the other. SIGHUP ends
# all at once.
set -euo pipefail

port=$1 processes=$2 logs=$3 nccl=$4 python=$5 action=$6
common=("${@:1:5}")
shift 6
name=${DSV3_HOST:-${SLURMD_NODENAME:-$(hostname)}}

environment() {
    set -a
    # shellcheck source=/dev/null
    source "$nccl"
    : "${CUDA_DEVICE_MAX_CONNECTIONS:=1}" # tensor parallelism asks for it before Blackwell
    : "${PYTORCH_CUDA_ALLOC_CONF:=expandable_segments:True}"
    : "${OMP_NUM_THREADS:=1}" "${HF_HUB_OFFLINE:=1}" "${TOKENIZERS_PARALLELISM:=false}" "${PYTHONWARNINGS:=ignore}"
    set +a
}

alone() {
    local words=() word
    for word in "$@"; do
        [[ $word != @node ]] || word=$name
        words+=("$word")
    done
    exec "$python" "${words[@]}"
}

ranks() {
    local hosts node_rank=0 host found="" own=$logs/torchrun_$name.log
    IFS=, read -ra hosts <<<"$1"
    shift
    for host in "${hosts[@]}"; do
        [[ $host != "$name" ]] || { found=yes && break; }
        node_rank=$((node_rank + 1))
    done
    [[ -n $found ]] || { echo "error: $name is none of ${hosts[*]}" >&2 && exit 2; }
    # shellcheck disable=SC2054  # the signals' commas
    local torchrun=("$python" -m torch.distributed.run --nnodes "${#hosts[@]}" --node-rank "$node_rank"
        --master-addr "${hosts[0]}" --master-port "$port" --nproc-per-node "$processes"
        --signals-to-handle SIGINT,SIGHUP,SIGQUIT)
    # Ignored from the start, ranks that still load included: they take both over once they can save.
    (
        trap '' USR1 TERM
        # Its long account of each stop goes to a log of its own; ranks write to theirs.
        DSV3_HOST=$name exec "${torchrun[@]}" --no-python bash "$0" "${common[@]}" rank "$@" 2>>"$own"
    ) &
    local agent=$! code
    trap 'tell_ranks "$agent"' USR1 TERM
    trap 'kill -HUP "$agent"' HUP
    while true; do
        code=0
        wait "$agent" || code=$?
        kill -0 "$agent" 2>/dev/null || break
    done
    [[ $code -eq 0 ]] || echo "$name: ranks ended with exit code $code: $own and rank_*.log beside it" >&2
    exit "$code"
}

tell_ranks() {
    local pid parent
    for stat in /proc/[0-9]*/stat; do
        # pid (name) state parent ...; a name may hold spaces, but ends at the last parenthesis
        read -r pid <"$stat" 2>/dev/null || continue
        parent=${pid##*) } parent=${parent#* } parent=${parent%% *} pid=${pid%% *}
        [[ $parent != "$1" ]] || kill -USR1 "$pid" 2>/dev/null || true
    done
}

rank() {
    local log
    log=$logs/rank_$(printf %05d "$RANK").log
    echo "---- $(date '+%F %T') $name, rank $RANK of $WORLD_SIZE: $*" >>"$log"
    if [[ $RANK == 0 ]]; then
        # To the job's log as well. Like the ranks, tee outlives signals, and a reader that has gone.
        exec > >(trap '' INT TERM USR1 HUP && exec tee -a --output-error=warn-nopipe "$log") 2>&1
    else
        exec >>"$log" 2>&1
    fi
    exec "$python" "$@"
}

[[ $action == rank ]] || environment
case $action in
alone | ranks | rank) "$action" "$@" ;;
*) echo "error: $action: expected alone, ranks or rank" >&2 && exit 2 ;;
esac

#!/usr/bin/env bash
# Fine-tunes DeepSeek-V3 671B on slurm, or any job on any number of nodes, and keeps it going.
#
#   bash examples/train_dsv3_671b.sh [option ...] [section.name=value ...]
#
# On a login node it submits itself. In an allocation it checks the nodes and trains on all of them; warned
# of the end (time limit, preemption) it saves, is requeued and goes on. Without slurm it uses this machine.
#
#   --nodes N             nodes (32); without slurm this one
#   --gpus-per-node N     (8); 0: none, for CPUs
#   --processes N         ranks a node (one a GPU; without GPUs 1)
#   --spares N            nodes more, to take the place of those that fail the pre-flight (0)
#   --job FILE            settings (examples/sft_671b.yaml)
#   --model DIR           Hugging Face directory; default: the job's
#   --data PATH           store of `megatron-dsv3 prepare`, or chat files; default: the job's
#   --name NAME           of the job and its folder (sft-671b)
#   --runs DIR            where run folders are, seen by all nodes (./runs)
#   --image IMAGE         run in this container; *.sqsh and *.sif tell by their name what starts them
#   --container KIND      pyxis, apptainer or docker
#   --mounts A:B,C:D      into the container, besides this checkout, runs, model and data
#   --python PYTHON       on the nodes (.venv's, if there is one; else python3)
#   --nccl FILE           settings of the network (examples/nccl.env)
#   --port PORT           where ranks meet, on the first node (by the job's number)
#   --time LIMIT          as sbatch takes it; default: the partition's
#   --warn-seconds N      before the limit, to save in (300)
#   --sbatch OPTION       any other of sbatch's, such as --sbatch --partition=gpu; may be repeated
#   --floor GB/S          pre-flight: least rate of a rank to other nodes (10 of GPUs)
#   --floor-inside GB/S   within a node (100 of GPUs)
#   --no-preflight        start without checking the nodes
#   --here                on this machine, even if there is slurm
#   --dry-run             print what would be submitted and run
#
# Each option may be given as a variable: DSV3_NODES=16. Settings of the job replace those of its file.
set -euo pipefail

# slurm runs a copy of this file, which knows by this variable where it came from.
here=${DSV3_EXAMPLES:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)}
# shellcheck source=examples/cluster/common.sh
source "$here/cluster/common.sh"

submit() {
    [[ -n $dry_run || ! -e $output ]] || die "$output: the model is written already; take another --name"
    export DSV3_EXAMPLES=$here
    local command=(sbatch --job-name="${opt[name]}" --nodes=$((opt[nodes] + opt[spares])) --ntasks-per-node=1
        --exclusive --mem=0 --requeue --signal="B:USR1@${opt[warn_seconds]}" --open-mode=append
        --output="$run/slurm-%j.log" --export=ALL)
    [[ ${opt[gpus_per_node]} == 0 ]] || command+=(--gpus-per-node="${opt[gpus_per_node]}")
    [[ -z ${opt[time]} ]] || command+=(--time="${opt[time]}")
    command+=(${sbatch[@]+"${sbatch[@]}"})
    # Asked first, as slurm takes any job that depends on others: what it can never start is refused here.
    attend "${command[@]}" --test-only "$here/train_dsv3_671b.sh"
    make_run
    option_words
    # One job of a name at a time (singleton): two would write to the same folder.
    attend "${command[@]}" --dependency=singleton "$here/train_dsv3_671b.sh" "${words[@]}"
}

# shellcheck disable=SC2329
launch() {
    local hosts=$1 n
    shift
    node_words "$@"
    if [[ -z $in_slurm ]]; then
        attend "${words[@]}"
        return
    fi
    n=$(count "$hosts")
    [[ $hosts != HOSTS ]] || n=${opt[nodes]} # a dry run
    [[ $hosts != HOST ]] || n=1
    local srun=(srun --nodes="$n" --ntasks="$n" --ntasks-per-node=1 --nodelist="$hosts" --cpu-bind=none
        --export=ALL --unbuffered)
    # When a rank's node fails, the others wait for it: end them. A node's report is its own affair.
    [[ $1 == alone ]] || srun+=(--kill-on-bad-exit=1)
    if [[ ${opt[container]} == pyxis ]]; then
        srun+=(--container-image="${opt[image]}" --container-mounts="$(mount_list)" --no-container-mount-home)
    fi
    attend "${srun[@]}" "${words[@]}"
}

# shellcheck disable=SC2329  # called by common.sh
# srun hands the signal to all processes of the step; without slurm node.sh does that.
pass_on() {
    kill -USR1 "$1" 2>/dev/null || true
}

# Requeued by us, unless slurm does it itself (preemption, node failure) or somebody cancelled the job.
requeue() {
    local state
    state=$(squeue --noheader --states=all --jobs "$SLURM_JOB_ID" --format %T)
    if [[ $state != RUNNING ]]; then
        say "the job is $state: not requeued from here"
    elif scontrol requeue "$SLURM_JOB_ID"; then
        say "requeued"
    else
        say "cannot be requeued; the same command goes on from the newest checkpoint"
    fi
}

in_allocation() {
    [[ -n ${opt[port]} ]] || opt[port]=$((20000 + SLURM_JOB_ID % 10000))
    say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST; everything is in $run"
    if [[ ${SLURM_RESTART_COUNT:-0} -gt 0 && -d $output ]]; then
        say "the model is written already: $output"
        return 0
    fi
    local all code=0
    all=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)
    keep_training "$all" || code=$?
    [[ $code -ne REQUEUE ]] || requeue
    return "$code"
}

on_this_machine() {
    if [[ ${opt[gpus_per_node]} -gt 0 ]]; then
        local found
        found=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
        [[ $found -ge ${opt[gpus_per_node]} ]] || die "--gpus-per-node ${opt[gpus_per_node]}: this machine has $found; 0 takes CPUs"
    fi
    [[ -n ${opt[port]} ]] || opt[port]=29500
    make_run
    export DSV3_HOST=localhost
    keep_training "$DSV3_HOST"
}

main() {
    read_options "$@"
    in_slurm=""
    if [[ -n $here_only ]]; then
        on_this_machine
    elif [[ -n ${SLURM_JOB_ID-} ]]; then
        in_slurm=yes
        make_run
        in_allocation
    elif command -v sbatch >/dev/null; then
        submit
        show_what_follows
    else
        on_this_machine
    fi
}

# With --dry-run: what the job will do once it has nodes.
show_what_follows() {
    [[ -n $dry_run ]] || return 0
    in_slurm=yes
    [[ -n ${opt[port]} ]] || opt[port]=PORT
    echo "# in the job, where HOSTS are its nodes, HOST is one of them, and PORT depends on its number:"
    keep_training HOSTS
}

main "$@"
exit

#!/usr/bin/env bash
# Fine-tunes DeepSeek-V3 671B, or any job, on a list of hosts without slurm, over pdsh or ssh.
#
#   bash examples/train_dsv3_pdsh.sh HOSTS [option ...] [section.name=value ...]
#
#   HOSTS                 a,b,c, or with pdsh node[1-32]; ranks meet on the first
#   --gpus-per-node N     (8); 0: none, for CPUs
#   --processes N         ranks a host (one a GPU; without GPUs 1)
#   --spares N            so many of HOSTS take the place of those that fail the pre-flight (0)
#   --job FILE            settings (examples/sft_671b.yaml)
#   --model DIR           Hugging Face directory; default: the job's
#   --data PATH           store of `megatron-dsv3 prepare`, or chat files; default: the job's
#   --name NAME           of the run's folder (sft-671b)
#   --runs DIR            where run folders are, seen by all hosts (./runs)
#   --image IMAGE         run in this container; *.sif tells by its name what starts it
#   --container KIND      apptainer or docker
#   --mounts A:B,C:D      into the container, besides this checkout, runs, model and data
#   --python PYTHON       on the hosts (.venv's, if there is one; else python3)
#   --nccl FILE           settings of the network (examples/nccl.env)
#   --port PORT           where ranks meet, on the first host (29500)
#   --floor GB/S          pre-flight: least rate of a rank to other nodes (10 of GPUs)
#   --floor-inside GB/S   within a node (100 of GPUs)
#   --no-preflight        start without checking the hosts
#   --dry-run             print what would be run
#
# This checkout, the run's folder, model and data are found under the same paths on all hosts. Each option
# may be given as a variable: DSV3_PROCESSES=2. SIGUSR1 and SIGTERM: save and end with exit code 75, "start
# me again". Ctrl-C ends it on all hosts at once.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=examples/cluster/common.sh
source "$here/cluster/common.sh"
# shellcheck source=examples/cluster/hosts.sh
source "$here/cluster/hosts.sh"

# shellcheck disable=SC2329  # called by common.sh
launch() {
    local hosts=$1 command
    shift
    node_words "$@"
    # ssh hands its words to a shell on the host, so each is quoted for one.
    command=$(printf '%q ' env DSV3_HOST=%h ${PYTHONPATH:+"PYTHONPATH=$PYTHONPATH"} "${words[@]}")
    attend on_hosts "$hosts" "$(remember_and_run "$id" "%h" "$command")"
}

# shellcheck disable=SC2329
pass_on() {
    on_hosts "$all" "$(signal_remembered "$id" USR1)" || true
}

# shellcheck disable=SC2329
end() {
    local code=$?
    trap - EXIT INT
    [[ -n $dry_run ]] || on_hosts "$all" "$(end_remembered "$id" HUP)" || true
    wait || true
    exit "$code"
}

main() {
    [[ $# -ge 1 ]] || usage 2
    [[ $1 != -h && $1 != --help ]] || usage 0
    [[ $1 != -* && $1 != *=* ]] || die "$1: expected the list of hosts first"
    read_hosts "$1"
    shift
    all=$(IFS=, && echo "${names[*]}")
    read_options "$@"
    [[ ${opt[container]} != pyxis ]] || die "--container pyxis needs slurm; use apptainer or docker"
    [[ -n ${opt[port]} ]] || opt[port]=29500
    [[ ${opt[spares]} -lt ${#names[@]} ]] || die "--spares ${opt[spares]}: there are ${#names[@]} hosts"
    id=train-dsv3-$(hostname)-$$
    make_run
    trap end EXIT
    trap 'exit 130' INT
    say "on $all; everything is in $run"
    keep_training "$all"
}

main "$@"
exit

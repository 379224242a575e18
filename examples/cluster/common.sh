# shellcheck shell=bash disable=SC2034
# Sourced by the scripts that train: their options, the run's folder, containers, and the loop that
# keeps a training going. A script that sources it brings
#   launch HOSTS WORDS...   runs node.sh with these words on all hosts (comma-separated), in the foreground
#   pass_on PID             tells what `launch` started as PID to save and stop

home=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
REQUEUE=75 # "start me again", as `megatron-dsv3 train` says it

declare -A opt=(
    [nodes]=32 [gpus_per_node]=8 [processes]="" [spares]=0
    [job]="$home/examples/sft_671b.yaml" [model]="" [data]="" [runs]="$PWD/runs" [name]=sft-671b
    [container]="" [image]="" [mounts]="" [python]="" [nccl]="$home/examples/nccl.env"
    [port]="" [time]="" [warn_seconds]=300 [floor]="" [floor_inside]=""
)
overrides=() sbatch=() dry_run="" here_only="" preflight=yes
stop="" child="" reminder=""

die() {
    echo "error: $*" >&2
    exit 2
}

say() {
    echo "-- $(date '+%F %T') $*"
}

usage() {
    sed -n '2,/^set -/{/^#/{s/^# \{0,1\}//;p}}' "$0"
    exit "$1"
}

# An option --gpus-per-node can be given as the variable DSV3_GPUS_PER_NODE too.
read_options() {
    local name variable value
    for name in "${!opt[@]}"; do
        variable=DSV3_${name^^}
        opt[$name]=${!variable-${opt[$name]}}
    done
    while [[ $# -gt 0 ]]; do
        case $1 in
        -h | --help) usage 0 ;;
        --dry-run) dry_run=yes ;;
        --here) here_only=yes ;;
        --no-preflight) preflight="" ;;
        --sbatch=*) sbatch+=("${1#--sbatch=}") ;;
        --sbatch)
            [[ $# -ge 2 ]] || die "--sbatch: expected an option of sbatch"
            sbatch+=("$2")
            shift
            ;;
        --*)
            name=${1#--} value=""
            if [[ $name == *=* ]]; then
                value=${name#*=} name=${name%%=*}
            else
                [[ $# -ge 2 ]] || die "--$name: expected a value"
                value=$2
                shift
            fi
            [[ -v opt[${name//-/_}] ]] || die "--$name: no such option; --help lists them"
            opt[${name//-/_}]=$value
            ;;
        *=*) overrides+=("$1") ;;
        *) die "$1: expected an option or a setting of the job, section.name=value" ;;
        esac
        shift
    done
    check_options
    locate_run
    # A container brings its own.
    [[ -n ${opt[container]} ]] || export PYTHONPATH=$home${PYTHONPATH:+:$PYTHONPATH}
}

check_options() {
    local name
    for name in nodes gpus_per_node spares warn_seconds; do
        [[ ${opt[$name]} =~ ^[0-9]+$ ]] || die "--${name//_/-}: expected a number, got '${opt[$name]}'"
    done
    [[ ${opt[nodes]} -ge 1 ]] || die "--nodes: expected 1 or more"
    # Without GPUs a node still has one process.
    [[ -n ${opt[processes]} ]] || opt[processes]=$((opt[gpus_per_node] > 0 ? opt[gpus_per_node] : 1))
    [[ ${opt[processes]} =~ ^[1-9][0-9]*$ ]] || die "--processes: expected a number of processes a node"
    [[ ${opt[name]} =~ ^[A-Za-z0-9._-]+$ ]] || die "--name: expected letters, digits, . _ -, got '${opt[name]}'"
    for name in job nccl; do
        [[ -f ${opt[$name]} ]] || die "--$name: ${opt[$name]}: no such file"
        opt[$name]=$(realpath "${opt[$name]}")
    done
    opt[runs]=$(realpath -m "${opt[runs]}")
    if [[ -z ${opt[python]} ]]; then
        opt[python]=python3
        [[ ! -x $home/.venv/bin/python || -n ${opt[image]} ]] || opt[python]=$home/.venv/bin/python
    fi
    if [[ -z ${opt[container]} && -n ${opt[image]} ]]; then
        case ${opt[image]} in
        *.sqsh) opt[container]=pyxis ;;
        *.sif) opt[container]=apptainer ;;
        *) die "--image ${opt[image]}: which --container is it for: pyxis, apptainer or docker?" ;;
        esac
    fi
    case ${opt[container]} in
    "") ;;
    pyxis | apptainer | docker) [[ -n ${opt[image]} ]] || die "--container ${opt[container]} needs --image" ;;
    *) die "--container: expected pyxis, apptainer or docker, got '${opt[container]}'" ;;
    esac
}

# Everything of a run is below one folder that its name alone decides: a requeued job finds it again.
locate_run() {
    local setting
    run=${opt[runs]}/${opt[name]}
    settings=("output.dir=$run/model" "checkpoint.dir=$run/checkpoints" "log.dir=$run/log")
    if [[ -n ${opt[model]} ]]; then
        opt[model]=$(realpath -m "${opt[model]}")
        settings+=("model.hf_dir=${opt[model]}")
    fi
    if [[ -n ${opt[data]} ]]; then
        opt[data]=$(realpath -m "${opt[data]}")
        if [[ -f ${opt[data]}/manifest.json ]]; then # what `megatron-dsv3 prepare` wrote
            settings+=("data.store=${opt[data]}" "data.paths=[]")
        else
            settings+=("data.store=null" "data.paths=['${opt[data]//\'/\'\'}']")
        fi
    fi
    settings+=(${overrides[@]+"${overrides[@]}"})
    for setting in "${settings[@]}"; do
        case $setting in
        checkpoint.dir=*) checkpoints=${setting#*=} ;;
        output.dir=*) output=${setting#*=} ;;
        esac
    done
}

# The same options again, as words, so that a submitted job does not depend on variables or folders.
option_words() {
    local name
    words=()
    for name in $(printf '%s\n' "${!opt[@]}" | sort); do
        [[ -z ${opt[$name]} ]] || words+=("--${name//_/-}=${opt[$name]}")
    done
    [[ -n $preflight ]] || words+=(--no-preflight)
    words+=(${overrides[@]+"${overrides[@]}"})
}

# What is run is what was submitted, even if the file is edited while the job waits.
make_run() {
    attend mkdir -p "$run/logs" "$run/preflight"
    [[ $(realpath "${opt[job]}") == "$(realpath -m "$run/job.yaml")" ]] || attend cp "${opt[job]}" "$run/job.yaml"
    opt[job]=$run/job.yaml
}

# ---- on the hosts ---------------------------------------------------------------------------------

# Words that run node.sh on a host, in the container if there is one.
node_words() {
    local mount mounts=()
    words=(bash "$home/examples/cluster/node.sh" "${opt[port]}" "${opt[processes]}" "$run/logs" "${opt[nccl]}"
        "${opt[python]}" "$@")
    IFS=, read -ra mounts <<<"$(mount_list)"
    case ${opt[container]} in
    apptainer)
        words=(apptainer exec --nv --bind "$(mount_list)" "${opt[image]}" "${words[@]}")
        ;;
    docker)
        local docker=(docker run --rm --network=host --ipc=host --ulimit memlock=-1 --ulimit stack=67108864
            --user "$(id -u):$(id -g)" -e HOME=/tmp -e SLURMD_NODENAME -e DSV3_HOST)
        [[ ${opt[gpus_per_node]} == 0 ]] || docker+=(--gpus all)
        for mount in "${mounts[@]}"; do
            docker+=(-v "$mount")
        done
        words=("${docker[@]}" --entrypoint bash "${opt[image]}" "${words[@]:1}")
        ;;
    esac
}

# This checkout, the run, model and data under their own paths, and what the user adds.
mount_list() {
    local path list=()
    for path in "$home" "${opt[runs]}" "$(dirname "${opt[nccl]}")" "${opt[model]}" "${opt[data]}"; do
        [[ -z $path || " ${list[*]-} " == *" $path:$path "* ]] || list+=("$path:$path")
    done
    local IFS=,
    echo "${list[*]}${opt[mounts]:+,${opt[mounts]}}"
}

# Words of `launch` that start the command line of this package on each of the hosts.
job_words() {
    local command=$1
    words=(-m megatron_dsv3.cli "$command" "${opt[job]}" "${settings[@]}")
}

# ---- keeping it going -------------------------------------------------------------------------------

# Runs the words in the background, so that signals are answered at once, and waits.
attend() {
    local code
    if [[ -n $dry_run ]]; then
        printf '%q ' "$@"
        echo
        return 0
    fi
    "$@" </dev/null &
    child=$!
    while true; do
        code=0
        wait "$child" || code=$?
        kill -0 "$child" 2>/dev/null || break # else a signal ended the waiting alone
    done
    child=""
    [[ -z $reminder ]] || kill "$reminder" 2>/dev/null || true
    reminder=""
    return "$code"
}

# SIGUSR1 or SIGTERM: save and stop. Said again and again, as a process that still loads does not hear.
warned() {
    [[ -z $stop ]] || return 0
    stop=$1
    say "$1: the run is told to save and stop"
    [[ -n $child ]] || return 0
    (
        trap - USR1 TERM
        while kill -0 "$child" 2>/dev/null; do
            pass_on "$child"
            sleep 2
        done
    ) &
    reminder=$!
}

newest() {
    cat "$checkpoints/latest_checkpointed_iteration.txt" 2>/dev/null || echo none
}

# Trains on the hosts until the end, a signal, or a failure that would only happen again: an attempt
# that made no checkpoint is not followed by another.
keep_training() {
    local all=$1 code before
    trap 'warned SIGUSR1' USR1
    trap 'warned SIGTERM' TERM
    while true; do
        hosts=$all
        check_hosts || return $?
        [[ -z $stop ]] || return "$REQUEUE"
        before=$(newest)
        [[ -n $dry_run ]] || rm -f "$checkpoints/requeue"
        job_words train
        code=0
        launch "$hosts" ranks "$hosts" "${words[@]}" || code=$?
        [[ $code -ne 0 ]] || return 0
        if [[ -n $stop || -e $checkpoints/requeue ]]; then
            say "stopped; newest checkpoint: $(newest)"
            return "$REQUEUE"
        fi
        if [[ $(newest) == "$before" ]]; then
            say "failed, and without a new checkpoint (newest: $before): not started again; see $run/logs"
            return "$code"
        fi
        say "failed after checkpoint $(newest): started again; see $run/logs"
    done
}

# Sets hosts to those that are fit, and fails where they are too few.
check_hosts() {
    [[ -n $preflight ]] || return 0
    local all=$hosts needed before slow=0
    needed=$(($(count "$all") - opt[spares]))
    [[ -z $dry_run ]] || needed=${opt[nodes]}
    # What the nodes say of themselves, which of them are taken, and how fast they reach each other.
    job_words preflight
    local job=("${words[@]}") reports=$run/preflight
    [[ -n $dry_run ]] || rm -rf "$reports"
    [[ -n $dry_run ]] || mkdir -p "$reports"
    launch "$all" alone "${job[@]}" --step report --dir "$reports" --node @node || true
    [[ -z $stop ]] || return 0
    local first=HOST
    [[ -n $dry_run ]] || first=$(first_report "$all" "$reports") || return 2
    while true; do
        launch "$first" alone "${job[@]}" --step choose --dir "$reports" --nodes "$all" --needed "$needed" || return $?
        [[ -n $dry_run ]] || hosts=$(<"$reports/nodes")
        [[ -z $stop ]] || return 0
        local code=0
        launch "$hosts" ranks "$hosts" "${job[@]}" --step links --dir "$reports" --nodes "$hosts" \
            ${opt[floor]:+--floor="${opt[floor]}"} ${opt[floor_inside]:+--floor-inside="${opt[floor_inside]}"} || code=$?
        [[ $code -ne 0 ]] || return 0
        # Nodes with slow links have left a file; spares may take their place.
        [[ -z $stop ]] || return 0
        before=$slow slow=$(find "$reports" -name '*.slow' | wc -l)
        [[ ${opt[spares]} -gt 0 && $slow -gt $before ]] || return "$code"
    done
}

first_report() {
    local host
    for host in ${1//,/ }; do
        [[ ! -f $2/$host.json ]] || { echo "$host" && return 0; }
    done
    say "pre-flight: none of $1 reported anything; see $run/logs" >&2
    return 2
}

count() {
    local list
    IFS=, read -ra list <<<"$1"
    echo "${#list[@]}"
}

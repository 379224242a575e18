#!/usr/bin/env bash
# Serves an exported DeepSeek-V3 with vLLM on a list of hosts, over pdsh and ssh.
#
#   bash examples/serve_dsv3_pdsh.sh HOSTS HF_DIR [option ...]
#
#   HOSTS              as pdsh takes them: a,b,c or node[1-4]; 4 hosts in BF16, 2 in FP8
#   --tp N             devices that share each layer (8)
#   --pp N             stages (as many as there are hosts)
#   --host ADDRESS     where the first host listens (127.0.0.1: reach it with ssh -L PORT:127.0.0.1:PORT)
#   --port PORT        (8000)
#   --main-port PORT   where the other hosts find the first one (29501)
#   --cli COMMAND      how to call this package on a host (megatron-dsv3)
#   --python PYTHON    of the environment with vLLM, on every host (python3)
#   --api-key-file F   file on the hosts that holds the key which requests must carry
#   anything else      goes to `megatron-dsv3 serve run`, and what that does not know to vLLM
#
# HF_DIR and the environments are found under the same paths on all hosts. A curl line is printed
# once the server answers; Ctrl-C or SIGTERM ends it on all hosts.
set -euo pipefail

usage() {
    sed -n '/^# Serves/,/^set/{/^#/{s/^# \{0,1\}//;p}}' "$0" >&2
    exit 2
}

# shellcheck source=examples/cluster/hosts.sh
source "$(dirname "${BASH_SOURCE[0]}")/cluster/hosts.sh"
[[ $# -ge 2 && $1 != -* && $2 != -* ]] || usage
hosts=$1 hf_dir=$2
shift 2
read_hosts "$hosts"
tp=8 pp=${#names[@]} main_port=29501
cli=(megatron-dsv3) python=python3 key_file="" rest=()
while [[ $# -gt 0 ]]; do
    case $1 in
    --tp | --pp | --main-port | --cli | --python | --api-key-file)
        [[ $# -ge 2 ]] || usage
        case $1 in
        --tp) tp=$2 ;;
        --pp) pp=$2 ;;
        --main-port) main_port=$2 ;;
        --cli) read -ra cli <<<"$2" ;;
        --python) python=$2 ;;
        --api-key-file) key_file=$2 ;;
        esac
        shift 2
        ;;
    *)
        rest+=("$1")
        shift
        ;;
    esac
done

# ssh hands its words to a shell on the host, so each is quoted for one.
command=$(printf '%q ' "${cli[@]}" serve run "$hf_dir" --python "$python" --tp "$tp" --pp "$pp" \
    --nodes "${#names[@]}" --main-address "${names[0]}" --main-port "$main_port" \
    ${rest[@]+"${rest[@]}"})
key=""
[[ -z $key_file ]] || key="VLLM_API_KEY=\$(cat $(printf '%q' "$key_file")) && export VLLM_API_KEY && "
id="serve-dsv3-$(hostname)-$$"

# Scripts for bash on the hosts, in one line each, so that any login shell can hand them on. A host's
# rank is its place in the list.
remote="rank=0; for name in ${names[*]}; do [[ \$name == %h ]] && break; rank=\$((rank + 1)); done; ${key}"
remote+=$(remember_and_run "$id" "\$rank" "$command --node-rank \$rank")
all=$(IFS=, && echo "${names[*]}")

end() {
    code=$?
    trap - EXIT INT TERM
    on_hosts "$all" "$(end_remembered "$id")" || true
    wait || true
    exit "$code"
}
trap end EXIT
trap 'exit 0' INT TERM

# In the background, so that a signal is answered at once.
on_hosts "$all" "$remote" </dev/null &
wait "$!"

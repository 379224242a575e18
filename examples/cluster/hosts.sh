# shellcheck shell=bash disable=SC2034
# Sourced by the scripts for hosts without slurm: runs commands over pdsh and ssh, and ends them.
#
# ssh passes no signals on, so what is to be ended writes its process id to a file on its host.

# Names one by one in the order of the list, a,b,c or node[1-4]; without pdsh only the first form.
read_hosts() {
    local list=$1
    if command -v pdsh >/dev/null; then
        mapfile -t names < <(pdsh -Q -R exec -w "$list" true | tail -n 1 | tr ',' '\n')
    elif [[ $list == *"["* ]]; then
        echo "error: $list: only pdsh reads brackets; install it, or write a,b,c" >&2
        exit 2
    else
        IFS=, read -ra names <<<"$list"
    fi
}

# Runs a bash script of one line, in which %h is the host's name, on each of the hosts a,b,c at once. Lines of
# output begin with the host's name; the exit code is the worst.
on_hosts() {
    local list=$1 script=$2 host pids=() pid code=0 one
    if command -v pdsh >/dev/null; then
        # -S: the worst exit code of all hosts.
        pdsh -S -R exec -f 1024 -w "$list" ssh -o BatchMode=yes %h "bash -c ${script@Q}"
        return
    fi
    for host in ${list//,/ }; do
        one=${script//%h/$host}
        (ssh -o BatchMode=yes "$host" "bash -c ${one@Q}" 2>&1 | sed -u "s/^/$host: /") </dev/null &
        pids+=("$!")
    done
    for pid in "${pids[@]}"; do
        one=0
        wait "$pid" || one=$?
        [[ $one -le $code ]] || code=$one
    done
    return "$code"
}

# A script that leaves its process id in /tmp/ID.NAME and becomes the command, quoted for bash.
remember_and_run() {
    echo "umask 077; echo \$\$ >/tmp/$1.$2; exec $3"
}

# A script that sends a signal to what left its process id in /tmp/ID.*, where that still runs.
signal_remembered() {
    echo "for file in /tmp/$1.*; do [[ -e \$file ]] || continue; pid=\$(cat \$file 2>/dev/null) || continue;" \
        "kill -$2 \$pid 2>/dev/null; done; true"
}

# The same with SIGTERM, or what is named; waits a minute for them to end, and removes the files.
end_remembered() {
    echo "for file in /tmp/$1.*; do [[ -e \$file ]] || continue; pid=\$(cat \$file 2>/dev/null) || continue;" \
        "kill -${2:-TERM} \$pid 2>/dev/null; for ((i = 0; i < 120; i++)); do" \
        "kill -0 \$pid 2>/dev/null || break; sleep 0.5; done; rm -f \$file; done"
}

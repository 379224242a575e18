#!/usr/bin/env bash
# A Docker daemon of its own: state and socket in ROOT, no bridge, no firewall rules.
#
#   docker.sh up ROOT      DOCKER_HOST=unix://ROOT/docker.sock reaches it
#   docker.sh down ROOT
set -euo pipefail

root=$(realpath -m "$2")
export DOCKER_HOST=unix://$root/docker.sock

case $1 in
up)
    mkdir -p "$root"
    dockerd --data-root "$root/data" --exec-root "$root/exec" --pidfile "$root/pid" --host "$DOCKER_HOST" \
        --iptables=false --ip6tables=false --bridge=none \
        --default-ulimit "nofile=$(ulimit -n):$(ulimit -Hn)" >"$root/log" 2>&1 &
    for ((i = 0; i < 300; i++)); do
        timeout 5 docker info >/dev/null 2>&1 && exit 0
        kill -0 "$!" 2>/dev/null || break
        sleep 0.1
    done
    tail -n 20 "$root/log" >&2
    exit 1
    ;;
down)
    pid=$(cat "$root/pid" 2>/dev/null || true)
    [[ -z $pid ]] || kill "$pid" 2>/dev/null || true
    # It ends containers and its containerd first, and unmounts.
    for ((i = 0; i < 300; i++)); do
        [[ -n $pid && -d /proc/$pid ]] || break
        sleep 0.1
    done
    [[ -z $pid ]] || kill -KILL "$pid" 2>/dev/null || true
    while read -r _ mounted _; do
        [[ $mounted != "$root"/* ]] || umount --lazy "$mounted" || true
    done </proc/mounts
    ;;
*)
    exit 2
    ;;
esac

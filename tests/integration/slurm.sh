#!/usr/bin/env bash
# A slurm cluster on this machine's loopback: its own keys, ports and state, all in ROOT.
#
#   slurm.sh up ROOT NODES GPUS PORT     controller at PORT, nodes node1, node2, ... at the next ones
#   slurm.sh down ROOT                   ends jobs and daemons of this ROOT, and no others
#
# Jobs of the partition `urgent` preempt those of `batch`, which are requeued. A requeued job waits until
# its credential has expired (cred_expire), two minutes by default.
#
# Every user of it sets SLURM_CONF=ROOT/slurm.conf. Needs root, slurm-wlm and munge.
set -euo pipefail

action=$1 root=$(realpath -m "$2")
export SLURM_CONF=$root/slurm.conf
socket=$root/run/munge.socket
host=$(hostname -s)

configure() {
    local nodes=$1 gpus=$2 port=$3 i
    cat <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$socket,cred_expire=5
CredType=cred/munge
SlurmctldPort=$port
SlurmctldPidFile=$root/run/slurmctld.pid
SlurmdPidFile=$root/run/slurmd.%n.pid
SlurmctldLogFile=$root/log/slurmctld.log
SlurmdLogFile=$root/log/slurmd.%n.log
StateSaveLocation=$root/state
SlurmdSpoolDir=$root/spool.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
MpiDefault=none
ReturnToService=1
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,sched_min_interval=0,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
KillWait=40
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
PropagateResourceLimits=NONE
CONF
    for ((i = 1; i <= nodes; i++)); do
        echo "NodeName=node$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + i)) CPUs=8" \
            "RealMemory=8000 Gres=gpu:$gpus State=UNKNOWN"
    done
    echo "PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60"
    echo "PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF"
}

up() {
    local nodes=$1 gpus=$2 port=$3 i
    mkdir -p "$root"/{state,log,run,munge,devices}
    chmod 755 "$root" "$root/log"
    chmod 700 "$root/munge"
    (umask 077 && head -c 128 /dev/urandom >"$root/munge/key")
    munged --force --key-file="$root/munge/key" --socket="$socket" \
        --pid-file="$root/run/munged.pid" --log-file="$root/munge/log" \
        --seed-file="$root/munge/seed" --num-threads=2
    configure "$nodes" "$gpus" "$port" >"$SLURM_CONF"
    for ((i = 0; i < gpus; i++)); do
        mknod "$root/devices/gpu$i" c 1 3 # /dev/null under another name: slurm only counts them
    done
    echo "Name=gpu File=$root/devices/gpu[0-$((gpus - 1))]" >"$root/gres.conf"
    for ((i = 1; i <= nodes; i++)); do
        # The names of nodes are what the jobs under test get to see.
        getent hosts "node$i" >/dev/null || echo "127.0.0.1 node$i # $root" >>/etc/hosts
    done
    slurmctld
    for ((i = 1; i <= nodes; i++)); do
        mkdir -p "$root/spool.node$i"
        slurmd -N "node$i"
    done
    for ((i = 0; i < 150; i++)); do
        [[ $(sinfo -h -t idle -o %D 2>/dev/null) == "$nodes" ]] && return
        sleep 0.2
    done
    tail -n 20 "$root"/log/* >&2
    return 1
}

down() {
    local i file
    scancel --user=root 2>/dev/null || true
    for ((i = 0; i < 250; i++)); do
        squeue -h 2>/dev/null | grep -q . || break
        sleep 0.2
    done
    for file in "$root"/run/slurmd.*.pid "$root/run/slurmctld.pid" "$root/run/munged.pid"; do
        [[ ! -s $file ]] || kill "$(cat "$file")" 2>/dev/null || true
    done
    # Written over, not replaced: in a container the file is mounted.
    file=$(grep -v " # $root\$" /etc/hosts)
    echo "$file" >/etc/hosts
}

shift 2
case $action in
up) up "$@" ;;
down) down ;;
*) exit 2 ;;
esac

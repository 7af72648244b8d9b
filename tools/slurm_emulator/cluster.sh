#!/usr/bin/env bash
# Run a real Slurm of N nodes on one machine: munged, slurmctld, and for each node a slurmd in its own namespaces. Needs root.
#
#   cluster.sh up N [options]       start nodes n1..nN; return when all are idle
#       --host                      no namespaces, all nodes on the loopback: for hundreds of nodes; no crash, rate or disk
#       --delay-us D                connect the nodes by a userspace switch with this one-way delay
#       --rate-mbit R               with --delay-us: send rate limit of each node
#       --disk-mb M                 size of the node-local disk (1024)
#       --node-timeout-s T          SlurmdTimeout: requeue the jobs of a node that is silent for this long (60)
#   cluster.sh down                 stop all that `up` started, also after a failed `up`; keep the logs
#   cluster.sh crash NODE           emulate a power cut: take its link down, then kill its processes; its disk keeps its files
#   cluster.sh boot NODE            start a crashed node again
#   cluster.sh rate NODE RATE|none  limit its send and receive rate (tc's units: 10mbit); not with --delay-us
#   cluster.sh disk NODE full|read-only|ok
#   cluster.sh status
#   eval "$(cluster.sh env)"        point sbatch, srun and the other Slurm commands at this cluster
#
# TSM_CLUSTER: the cluster's folder ($TMPDIR/tsm-cluster). Several clusters can be up at the same time, each in its own folder.
#
# While it is up, the kernel's autogroup scheduling is off (sysctl kernel.sched_autogroup_enabled).
#
# A node has its own network, host name, /etc/hosts, /dev/shm, /mnt/local (its disk, nodes/NODE/disk in the folder) and 6 GPUs: the
# device files in nodes/NODE/gpu. A GPU whose file is removed disappears from nvidia-smi; bin/nvidia-smi documents how to make a GPU
# faulty. A node's tasks get the variables in its /mnt/local/task_environment. Nodes share all else, including /tmp.
#
# Partitions: `emu` and, on the same nodes, the preemptible `scavenge`. Partitions without running nodes, for `sbatch --test-only` and
# `--hold`: `summit` (256 nodes of 6 GPUs), `dgx` (192 of 8) and `quad` (384 of 4). Each node claims 42 CPUs.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=$(realpath --canonicalize-missing "${TSM_CLUSTER:-${TMPDIR:-/tmp}/tsm-cluster}")
# Written by `up`. A cluster is up if and only if this file exists.
settings=$folder/etc/settings
export SLURM_CONF=$folder/etc/slurm.conf

readonly local_disk=/mnt/local
readonly autogroup=/proc/sys/kernel/sched_autogroup_enabled
readonly marker=this-is-an-emulated-cluster

# shellcheck source-path=SCRIPTDIR source=slurm_conf.sh
source "$here/slurm_conf.sh"
# shellcheck source-path=SCRIPTDIR source=nodes.sh
source "$here/nodes.sh"

die() {
    echo "cluster: $*" >&2
    exit 1
}

# ------------------------------------------------------------------------------------------------------------------ up

up() {
    read_up_options "$@"
    check_machine
    [[ ! -e $settings ]] || die "one is up already in $folder. Fix: $0 down"
    # `up` empties the folder, so it must be a cluster's.
    if [[ -n $(ls -A "$folder" 2>/dev/null) && ! -e $folder/$marker ]]; then
        die "$folder holds files of something else. Fix: TSM_CLUSTER=AN_EMPTY_FOLDER"
    fi
    claim_number
    trap 'failed_up $? "$BASH_COMMAND"' EXIT
    make_folder
    share_cores_fairly
    start_munged
    [[ $mode == host ]] || make_network
    slurmctld -c
    local number
    for ((number = 1; number <= nodes; number++)); do
        start_node "n$number"
    done
    wait_until_idle
    trap - EXIT
    echo "cluster: $nodes nodes are up in $folder. Next: eval \"\$($0 env)\""
}

# Turn autogroup scheduling off: it shares cores between sessions first, and each Slurm step on a node is one session. An MPI rank that
# waits yields its core (sched_yield) only within its session, which starves the node that it waits for: steps took 1 to 20 times as long.
share_cores_fairly() {
    if [[ $(cat "$autogroup" 2>/dev/null) == 1 ]] && echo 0 2>/dev/null >"$autogroup"; then
        touch "$folder/etc/autogroup_was_on"
    fi
}

read_up_options() {
    nodes=${1:-}
    [[ $nodes =~ ^[1-9][0-9]*$ ]] || die "how many nodes? cluster.sh up N"
    shift
    mode=bridge delay_us=0 rate_mbit=0 disk_mb=1024 node_timeout_s=60
    while (($#)); do
        case $1 in
            --host) mode=host && shift && continue ;;
            --delay-us) mode=switch delay_us=${2:?} ;;
            --rate-mbit) rate_mbit=${2:?} ;;
            --disk-mb) disk_mb=${2:?} ;;
            --node-timeout-s) node_timeout_s=${2:?} ;;
            *) die "no such option of up: $1" ;;
        esac
        shift 2
    done
    message_timeout_s=10 tcp_timeout_s=2 credential_s=5
    if [[ $mode == host ]]; then
        # Hundreds of daemons and a thousand tasks share a few cores.
        message_timeout_s=100 tcp_timeout_s=30 credential_s=600
        ((node_timeout_s >= 300)) || node_timeout_s=300
    elif ((nodes > 100)); then
        die "$nodes nodes are too many for namespaces. Fix: --host"
    fi
    [[ $rate_mbit == 0 || $mode == switch ]] || die "--rate-mbit needs --delay-us. Fix: cluster.sh rate NODE RATE"
}

check_machine() {
    need_root
    local -A package=([munged]=munge [slurmctld]=slurmctld [slurmd]=slurmd [sinfo]=slurm-client [ip]=iproute2 [tc]=iproute2)
    local program missing=()
    for program in "${!package[@]}"; do
        command -v "$program" >/dev/null || missing+=("${package[$program]}")
    done
    if ((${#missing[@]})); then
        mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)
        die "not installed: ${missing[*]}. Fix: apt-get install --no-install-recommends ${missing[*]}"
    fi
    [[ $mode != switch || -c /dev/net/tun ]] || die "--delay-us needs /dev/net/tun. Fix: modprobe tun"
}

# Number the cluster, so that clusters share no ports, addresses or names. Creating an empty network namespace claims a number.
claim_number() {
    local taken
    for ((cluster = 0; cluster < 40; cluster++)); do
        name_things
        taken=$(node_links; ss --no-header --listening --tcp --numeric "sport = :$controller_port")
        [[ -z $taken ]] && ip netns add "$claim" 2>/dev/null && return
    done
    die "40 clusters are up already"
}

name_things() {
    claim=tsm$cluster bridge=tsm$cluster
    prefix=tsm$cluster- # of links and network namespaces
    network=10.78.$cluster
    controller_address=$network.254
    [[ $mode != host ]] || controller_address=127.0.0.1
    controller_port=$((15000 + cluster))
    first_node_port=$((16001 + 1000 * cluster))
}

make_folder() {
    rm -rf "${folder:?}"/{etc,run,log,state,nodes}
    mkdir -p "$folder"/{etc,run,log,state}
    touch "$folder/$marker"
    printf '%s\n' "nodes=$nodes" "mode=$mode" "disk_mb=$disk_mb" "cluster=$cluster" >"$settings"
    local number gpu node
    for ((number = 1; number <= nodes; number++)); do
        node=$folder/nodes/n$number
        mkdir -p "$node"/{spool,tmp,gpu}
        for gpu in {0..5}; do
            mknod "$node/gpu/nvidia$gpu" c 1 3 # /dev/null's numbers
        done
    done
    print_slurm_conf >"$SLURM_CONF"
    print_gres_conf >"$folder/etc/gres.conf"
    {
        echo "127.0.0.1 localhost"
        echo "$controller_address $(hostname)"
        for ((number = 1; number <= nodes; number++)); do
            echo "$network.$number n$number"
            # The address as seen by programs that listen on IPv6 and IPv4 at once.
            echo "::ffff:$network.$number n$number"
        done
    } >"$folder/etc/hosts"
    if [[ $mode != host && ! -d $local_disk ]]; then
        mkdir -p "$local_disk"
        touch "$local_disk/$marker"
    fi
}

start_munged() {
    (umask 077 && head -c 128 /dev/urandom >"$folder/etc/munge.key")
    # --force: munged otherwise refuses a folder that only root may enter.
    munged --force --key-file="$folder/etc/munge.key" --socket="$folder/run/munge.sock" \
        --pid-file="$folder/run/munged.pid" --log-file="$folder/log/munged.log" --seed-file="$folder/run/munge.seed"
}

wait_until_idle() {
    local idle=0 deadline_s=$((SECONDS + 60 + nodes / 4))
    while true; do
        idle=$(sinfo --noheader --Node --partition=emu --format=%t 2>/dev/null | grep -c '^idle$' || true)
        ((idle != nodes)) || return 0
        if ((SECONDS >= deadline_s)); then
            tail -n 5 "$folder"/log/{slurmctld,slurmd.n1}.log >&2
            die "only $idle of $nodes nodes became idle; see the ends of two logs above, and $folder/log"
        fi
        sleep 0.2
    done
}

failed_up() {
    echo "cluster: up failed at '$2', stopping what was started" >&2
    down || true
    exit "$1"
}

need_root() {
    ((EUID == 0)) || die "namespaces and Slurm's daemons need root. Fix: sudo --preserve-env=TSM_CLUSTER,TMPDIR $0 ..."
}

need_up() {
    [[ -e $settings ]] || die "none is up in $folder. Fix: $0 up N"
    # shellcheck source=/dev/null
    source "$settings"
    name_things
}

# ---------------------------------------------------------------------------------------------------------------- down

down() {
    if [[ ! -e $settings ]]; then
        echo "cluster: none is up in $folder"
        return
    fi
    # Each step must tolerate missing parts: `down` also cleans up after an `up` that failed anywhere.
    need_root
    need_up
    if [[ $mode == host ]]; then
        timeout 5 scancel --quiet --user=root 2>/dev/null || true
        wait_for_empty_queue
    fi
    local namespace link mounted
    while IFS= read -r namespace; do
        kill_namespace "$namespace"
        ip netns del "$namespace"
    done < <(node_namespaces)
    end_daemons
    # The kernel removes links together with their namespaces, but later.
    while IFS= read -r link; do
        ip link del "$link" 2>/dev/null || true
    done < <(node_links)
    ip link del "$bridge" 2>/dev/null || true
    while IFS= read -r mounted; do
        # --lazy: another process may have a file or folder open in it.
        umount "$mounted" || umount --lazy "$mounted"
    done < <(findmnt --noheadings --raw --output=TARGET | grep -F "$folder/" || true)
    # Only if `up` made it and no other cluster uses it: removing it would unmount that cluster's disks.
    if [[ -e $local_disk/$marker && ! $(ip netns list) =~ tsm[0-9]+-n ]]; then
        rm "$local_disk/$marker"
        rmdir "$local_disk" 2>/dev/null || true
    fi
    [[ ! -e $folder/etc/autogroup_was_on ]] || echo 1 >"$autogroup"
    rm -rf "${folder:?}"/{nodes,state,run,etc}
    ip netns del "$claim" 2>/dev/null || true
}

# Host mode has no namespaces whose processes could be killed: let jobs end before their slurmd does.
wait_for_empty_queue() {
    local deadline_s=$((SECONDS + 30))
    while [[ -n $(timeout 5 squeue --noheader 2>/dev/null) ]] && ((SECONDS < deadline_s)); do
        sleep 0.5
    done
}

# Send SIGTERM to all at once, since each slurmd takes two seconds to end; after 10 s send SIGKILL.
end_daemons() {
    local file pids=() pid deadline_s=$((SECONDS + 10))
    for file in "$folder"/run/*.pid; do
        [[ -s $file ]] || continue
        pid=$(<"$file")
        is_ours "$pid" && kill "$pid" 2>/dev/null && pids+=("$pid")
    done
    for pid in "${pids[@]}"; do
        while is_ours "$pid"; do
            if ((SECONDS >= deadline_s)); then
                kill -9 "$pid" 2>/dev/null || true
            fi
            sleep 0.1
        done
    done
}

# The PID in a file may have been reused by another process.
is_ours() {
    local command
    command=$(tr '\0' ' ' 2>/dev/null <"/proc/$1/cmdline") || return 1
    [[ $command =~ (munged|slurmctld|slurmd|switch\.py) ]]
}

# -------------------------------------------------------------------------------------------------------------- others

print_env() {
    need_up
    printf 'export TSM_CLUSTER=%q SLURM_CONF=%q\n' "$folder" "$SLURM_CONF"
}

status() {
    need_up
    sinfo --format='%12P %6D %8t %N'
    squeue
    [[ $mode == bridge ]] || return 0
    local number limit free
    for ((number = 1; number <= nodes; number++)); do
        limit=$(tc qdisc show dev "${prefix}n$number" | sed -n 's/.*tbf.* rate \([^ ]*\).*/rate \1/p')
        free=$(df --output=avail --block-size=M "$folder/nodes/n$number/disk" | tail -n 1)
        echo "n$number: ${limit:-no rate limit}, disk ${free// /} free"
    done
}

command=${1:-}
[[ $# == 0 ]] || shift
# Its settings are sourced, as root.
owner=$(stat --format=%u "$folder" 2>/dev/null || echo 0)
[[ $owner == 0 || $owner == "$EUID" ]] || die "$folder belongs to user id $owner. Fix: TSM_CLUSTER=FOLDER"
case $command in
    up | down | status) "$command" "$@" ;;
    boot | crash | rate | disk) "$command" "${1:?which node?}" "${@:2}" ;;
    env) print_env ;;
    inside-node) inside_node "$@" ;;
    *)
        sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" >&2
        exit 2
        ;;
esac

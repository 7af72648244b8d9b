#!/usr/bin/env bash
# The emulated cluster's nodes: namespaces, network and fault injection. Sourced by cluster.sh, whose variables it reads.
# shellcheck disable=SC2154

make_network() {
    local number node
    if [[ $mode == switch ]]; then
        local ports=(":$bridge:$controller_address/24")
        for ((number = 1; number <= nodes; number++)); do
            node=${prefix}n$number
            ip netns add "$node"
            ip -n "$node" link set lo up
            ports+=("$node:eth0:$network.$number/24")
        done
        python3 "$here/switch.py" --delay-us "$delay_us" --rate-mbit "$rate_mbit" --pid-file "$folder/run/switch.pid" \
            "${ports[@]}" >"$folder/log/switch.log" 2>&1 || die "the switch did not start: $(cat "$folder/log/switch.log")"
        return
    fi
    ip link add "$bridge" type bridge
    ip addr add "$controller_address/24" dev "$bridge"
    ip link set "$bridge" up
    for ((number = 1; number <= nodes; number++)); do
        node=${prefix}n$number
        add_linked_namespace "$node"
        ip link set "$node" master "$bridge" up
        ip -n "$node" link set lo up
        ip -n "$node" addr add "$network.$number/24" dev eth0
        ip -n "$node" link set eth0 up
    done
}

# A kernel was seen to refuse such a link ("File exists") about once in thousands, without a known cause. Retry, and print the links that
# exist at that moment.
add_linked_namespace() {
    local node=$1 try
    for try in 1 2 3; do
        ip netns add "$node" && ip link add "$node" type veth peer name eth0 netns "$node" && return
        echo "cluster: try $try to link $node failed; links beside it: $(ip -brief link show | awk '{ printf "%s ", $1 }')" \
            "and in it: $(ip -n "$node" -brief link show | awk '{ printf "%s ", $1 }')" >&2
        ip link del "$node" 2>/dev/null || true
        ip netns del "$node" || true
        sleep 0.5
    done
    die "the kernel makes no link for $node"
}

start_node() {
    local node=$1
    if [[ $mode == host ]]; then
        slurmd -N "$node"
        return
    fi
    # Mount its disk outside its namespaces, so that its files outlive a crash.
    local disk=$folder/nodes/$node/disk
    if ! mountpoint --quiet "$disk"; then
        mkdir -p "$disk"
        mount -t tmpfs -o "size=${disk_mb}m,mode=1777" "$prefix$node" "$disk"
    fi
    nsenter --net="/run/netns/$prefix$node" unshare --mount --uts --ipc "$here/cluster.sh" inside-node "$node"
}

# Runs in the node's namespaces and becomes its slurmd.
inside_node() {
    local node=$1
    hostname "$node"
    mount --bind "$folder/etc/hosts" /etc/hosts
    mount -t tmpfs -o mode=1777 tmpfs /dev/shm
    mount --bind "$folder/nodes/$node/disk" "$local_disk"
    # Unmount this namespace's copies of the machine's mounts: they would keep disks and networks of other nodes and clusters alive.
    local source target
    while read -r source target; do
        [[ ! $source =~ ^tsm[0-9]+-n || $target == "$local_disk" ]] || umount --lazy "$target"
    done < <(findmnt --noheadings --raw --output=SOURCE,TARGET)
    umount --lazy /run/netns
    exec slurmd -N "$node"
}

boot() {
    need_node "$1" boot
    [[ -z $(ip netns pids "$prefix$1") ]] || die "$1 runs. Fix: $0 crash $1 first"
    ip -n "$prefix$1" link set eth0 up
    start_node "$1"
}

crash() {
    need_node "$1" crash
    # Take the link down first: otherwise the kernel would close every connection in an orderly way.
    ip -n "$prefix$1" link set eth0 down
    kill_namespace "$prefix$1"
}

rate() {
    need_node "$1" rate
    local node=$prefix$1 limit=${2:?the rate, as 10mbit, or none}
    [[ $mode == bridge ]] || die "with --delay-us the switch limits the rate. Fix: up N --delay-us D --rate-mbit R"
    if [[ $limit == none ]]; then
        # Removing a limit that is not set is no error.
        tc -n "$node" qdisc del dev eth0 root 2>/dev/null || true
        tc qdisc del dev "$node" root 2>/dev/null || true
        return
    fi
    tc -n "$node" qdisc replace dev eth0 root tbf rate "$limit" burst 256kb latency 50ms
    tc qdisc replace dev "$node" root tbf rate "$limit" burst 256kb latency 50ms
}

disk() {
    need_node "$1" disk
    local disk=$folder/nodes/$1/disk used_kb
    case ${2:-} in
        full)
            # Shrink it to what it holds and fill the last page: full, without using the machine's memory.
            used_kb=$(df --output=used "$disk" | tail -n 1)
            mount -o "remount,size=$((used_kb + 4))k" "$disk"
            cat /dev/zero >"$disk/.filler" 2>/dev/null || true
            ;;
        read-only) mount -o remount,ro "$disk" ;;
        ok)
            mount -o "remount,rw,size=${disk_mb}m" "$disk"
            rm -f "$disk/.filler"
            ;;
        *) die "disk $1 full, read-only or ok?" ;;
    esac
}

need_node() {
    local node=$1 action=$2
    need_root
    need_up
    [[ $mode != host ]] || die "$action works on nodes with namespaces. Fix: up without --host"
    [[ -d $folder/nodes/$node ]] || die "no node $node: there are n1..n$nodes"
}

kill_namespace() {
    local pids
    while mapfile -t pids < <(ip netns pids "$1") && ((${#pids[@]})); do
        kill -9 "${pids[@]}" 2>/dev/null || true
        sleep 0.05
    done
}

node_links() {
    ip -brief link show | awk -v prefix="$prefix" 'index($1, prefix "n") == 1 { sub("@.*", "", $1); print $1 }'
}

node_namespaces() {
    ip netns list 2>/dev/null | awk -v prefix="$prefix" 'index($1, prefix "n") == 1 { print $1 }'
}

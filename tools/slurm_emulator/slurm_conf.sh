#!/usr/bin/env bash
# The emulated cluster's configuration. Sourced by cluster.sh, whose variables it reads:
#   print_slurm_conf   slurm.conf, to stdout
#   print_gres_conf    gres.conf, to stdout
# shellcheck disable=SC2154

# Node shapes as Slurm options. config_overrides below makes slurmd accept them on a machine that has less.
readonly six_gpus="Sockets=2 CoresPerSocket=21 ThreadsPerCore=1 RealMemory=512000 Gres=gpu:6"
readonly eight_gpus="Sockets=2 CoresPerSocket=64 ThreadsPerCore=1 RealMemory=1024000 Gres=gpu:8"
readonly four_gpus="Sockets=1 CoresPerSocket=64 ThreadsPerCore=1 RealMemory=256000 Gres=gpu:4"

print_slurm_conf() {
    cat <<EOF
ClusterName=emulated
SlurmctldHost=$(hostname)($controller_address)
SlurmctldPort=$controller_port
SlurmUser=root
SlurmdUser=root
# Slurm delays a requeued job until its old credential has expired: two minutes by default.
AuthInfo=socket=$folder/run/munge.sock,cred_expire=$credential_s

# Slurm replaces %n by the node's name.
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/nodes/%n/spool
# One folder per node: the PMIx server keeps its sockets there, and two nodes in one folder break each other.
TmpFS=$folder/nodes/%n/tmp
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd.%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.%n.log
TaskProlog=$here/task_prolog.sh

# Nodes claim more CPUs and memory than the machine has: no CPU binding and no accounting.
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0

JobRequeue=1
ReturnToService=2
KillWait=20
MessageTimeout=$message_timeout_s
TCPTimeout=$tcp_timeout_s
UnkillableStepTimeout=600
SlurmdTimeout=$node_timeout_s

# A preempted job gets the signal that it requested with --signal, and the partition's GraceTime to end by itself.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal

# Reject a job at submission if its partition cannot run it.
EnforcePartLimits=ALL

$(print_nodes)
PartitionName=emu Nodes=n[1-$nodes] Default=YES PriorityTier=10 PreemptMode=OFF MaxTime=24:00:00
PartitionName=scavenge Nodes=n[1-$nodes] PriorityTier=1 PreemptMode=REQUEUE GraceTime=25 MaxTime=24:00:00

# Nodes without a slurmd: \`sbatch --test-only\` and \`sbatch --hold\` check the shape of a job against them. Only CLOUD nodes, which
# Slurm believes it can power up, count as usable without a slurmd. A job that is released onto them never starts.
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=INFINITE
SuspendExcNodes=n[1-$nodes]
NodeName=s[001-256] $six_gpus State=CLOUD
NodeName=d[001-192] $eight_gpus State=CLOUD
NodeName=q[001-384] $four_gpus State=CLOUD
PartitionName=summit Nodes=s[001-256] MaxTime=24:00:00
PartitionName=dgx Nodes=d[001-192] MaxTime=24:00:00
PartitionName=quad Nodes=q[001-384] MaxTime=24:00:00
EOF
}

print_nodes() {
    local number address
    for ((number = 1; number <= nodes; number++)); do
        if [[ $mode == host ]]; then
            address="NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=$((first_node_port + number))"
        else
            address="NodeHostname=n$number NodeAddr=$network.$number Port=$first_node_port"
        fi
        echo "NodeName=n$number $address $six_gpus State=UNKNOWN"
    done
}

# nvidia_gpu_env: Slurm sets CUDA_VISIBLE_DEVICES, as for NVIDIA GPUs.
print_gres_conf() {
    local number
    for ((number = 1; number <= nodes; number++)); do
        echo "NodeName=n$number Name=gpu File=$folder/nodes/n$number/gpu/nvidia[0-5] Flags=nvidia_gpu_env"
    done
}

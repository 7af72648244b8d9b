# shellcheck shell=bash
# Common part of all batch scripts: compose the configuration once, check the nodes, start the ranks, and requeue the job if that
# helps. launch/*.sh source this file inside a batch job and call `run_job OVERRIDES`.
#
# The run folder is outputs/RUN_ID; RUN_ID is the job's id unless run_id= sets another. It contains SUCCESS once the run is
# complete, and outcome.json with the outcome of the latest start. Exit codes: docs/operating.md.
set -euo pipefail

run_job() {
    cd "${checkout:?the folder of the project}"
    # metrics.jsonl counts from here.
    TSM_JOB_START=$(date +%s.%N)
    export TSM_JOB_START
    # Slurm signals only this shell (sbatch --signal=B:), at any time.
    srun_pid='' received=''
    trap 'receive USR1' USR1
    trap 'receive TERM' TERM
    trap '' PIPE
    load_site
    name_folder "$@"
    # A requeued job keeps its overrides.
    ((restarts == 0)) || leave_if_complete
    check_restarts
    set_environment
    announce
    compose "$@"
    leave_if_complete
    read_config
    check_nodes
    if [[ -n ${TSM_CHECK_ONLY:-} ]]; then
        say "all is well, and TSM_CHECK_ONLY is set: not starting the ranks"
        exit 0
    fi
    stage
    start_ranks
    [[ -z $TSM_ENVIRONMENT_ARCHIVE && $TSM_STAGE_DATA != on ]] || unstage
    conclude
}

# Print a line. A full disk, or a closed pipe, must not end this script before it forwards a signal or queues the job again.
say() {
    echo "[$(date +%FT%T) $(hostname)] $*" || true
}

# Exit with 2: the run cannot continue, and a restart would not help.
refuse() {
    say "error: $*" >&2
    exit 2
}

load_site() {
    : "${SLURM_JOB_ID:?this is a batch script. Fix: sbatch launch/NAME.sh, or launch/local.sh without Slurm}"
    local site=${TSM_SITE:-slurm/site.sh}
    if [[ -e $site ]]; then
        # shellcheck source=/dev/null
        source "$site"
    elif [[ -n ${TSM_SITE:-} ]]; then
        refuse "TSM_SITE=$TSM_SITE is not there"
    fi
    source slurm/sites/defaults.sh
    source slurm/environment.sh
    source slurm/stage.sh
    source slurm/requeue.sh
    # shellcheck disable=SC2086  # blanks separate modules
    [[ -z $TSM_MODULES ]] || module load $TSM_MODULES
    [[ $TSM_PYTHON == /* ]] || TSM_PYTHON=$checkout/$TSM_PYTHON
    container=()
    if [[ -n $TSM_CONTAINER_IMAGE ]]; then
        container=(--container-image="$TSM_CONTAINER_IMAGE" --container-workdir="$checkout"
            --container-mounts="$checkout:$checkout${TSM_CONTAINER_MOUNTS:+,$TSM_CONTAINER_MOUNTS}")
    fi
    [[ -n $TSM_CONTAINER_IMAGE || -x $TSM_PYTHON ]] ||
        refuse "no $TSM_PYTHON. Fix: make setup horovod, or TSM_PYTHON in slurm/site.sh"
    export TSM_PYTHON TSM_LOCAL_DISK
}

# Find the run folder. Python reads the overrides, so that the folder is the one that train.py would use.
name_folder() {
    local answer
    restarts=${SLURM_RESTART_COUNT:-0}
    answer=$(ask_python folder "$SLURM_JOB_ID" "$restarts" "$@" | tail -n 2) || cannot_start $?
    { IFS= read -r run_id && IFS= read -r folder; } <<<"$answer"
}

# Ask training/config/for_shell.py. It prints its answers last, a line each: a container may print something first.
ask_python() {
    in_container "$TSM_PYTHON" -m training.config.for_shell "$@"
}

# 75: a file server is away.
cannot_start() {
    (($1 != 75)) || requeue
    say "error: the job cannot start (exit code $1), for the reasons above" >&2
    exit "$1"
}

check_restarts() {
    if ((restarts > TSM_MAX_RESTARTS)); then
        say "error: queued again $restarts times already (TSM_MAX_RESTARTS). See $folder/log.txt; run_id=$run_id goes on" >&2
        exit 5
    fi
}

announce() {
    local tasks="$SLURM_NTASKS tasks on $SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST)"
    say "job $SLURM_JOB_ID, start $((restarts + 1)): $tasks, folder $folder"
    say "cores of a task: $SRUN_CPUS_PER_TASK, bound by ${TSM_CPU_BIND:-nobody}; $workers decode, $OMP_NUM_THREADS threads train"
    say "GPUs of a node: ${SLURM_GPUS_ON_NODE:-none}"
    if [[ -n ${SLURM_GPUS_ON_NODE:-} ]] && ((SLURM_GPUS_ON_NODE < $(tasks_per_node))); then
        refuse "$(tasks_per_node) tasks on a node share $SLURM_GPUS_ON_NODE GPUs. Fix: sbatch --ntasks-per-node=$SLURM_GPUS_ON_NODE"
    fi
}

# Print the tasks of the first node: SLURM_TASKS_PER_NODE=6(x256) means six on each of 256 nodes.
tasks_per_node() {
    echo "${SLURM_TASKS_PER_NODE%%[(,]*}"
}

# Write config.yaml. All ranks load this file. A requeued job reuses it, even if the checkout has changed; a new job with the same
# run_id composes it again.
compose() {
    if ((restarts > 0)) && [[ -e $folder/config.yaml ]]; then
        say "going on by $folder/config.yaml"
        return
    fi
    in_container "$TSM_PYTHON" plan.py "pipeline.workers=$workers" "$@" "run_id=$run_id" \
        "distributed.world_size=$SLURM_NTASKS" plan.write_config=true || cannot_start $?
}

# Read what this script needs of config.yaml.
read_config() {
    local answer
    answer=$(ask_python values data.root distributed.backend distributed.controller -- --run "$folder" | tail -n 3) || cannot_start $?
    { IFS= read -r data_root && IFS= read -r backend && IFS= read -r controller; } <<<"$answer"
}

# A complete run has SUCCESS. plan.py has removed it if the overrides make the run longer, and refused those that do not fit the run.
leave_if_complete() {
    if [[ -e $folder/SUCCESS ]]; then
        say "$folder is complete (SUCCESS is there): nothing to do"
        exit 0
    fi
}

# Run a command on the batch script's node, in the container if there is one.
in_container() {
    if [[ -z $TSM_CONTAINER_IMAGE ]]; then
        "$@"
    else
        srun --nodes=1 --ntasks=1 --overlap "${container[@]}" "$@"
    fi
}

check_nodes() {
    [[ $TSM_PREFLIGHT != off ]] || return 0
    local code=0 bad=$folder/bad_nodes.txt
    rm -f "$bad"
    slurm/preflight.sh --bad-nodes-file "$bad" --run-folder "$folder" -- "${container[@]}" \
        ${TSM_CPU_BIND:+--cpu-bind="$TSM_CPU_BIND"} || code=$?
    ((code)) || return 0
    if [[ $TSM_PREFLIGHT == exclude && -s $bad ]]; then
        exclude_and_requeue "$(paste -sd, "$bad")"
    fi
    say "error: preflight found what is named above (exit code $code). Fix: sbatch --exclude=NODES, or TSM_PREFLIGHT=exclude" >&2
    exit 2
}

stage() {
    [[ -z $TSM_ENVIRONMENT_ARCHIVE ]] || stage_environment
    [[ $TSM_STAGE_DATA != on ]] || stage_data "$data_root"
}

# Start the ranks with srun; the configuration's backend decides the MPI plugin.
start_ranks() {
    local mpi=none
    [[ $backend != horovod || $controller == gloo ]] || mpi=$TSM_SRUN_MPI
    # Distribute ranks in blocks, so that neighbouring ranks, which share a batch-norm group, share a node.
    # If a rank fails, srun does not kill the others: the monitor tells them the reason, and they log it and exit.
    local arguments=(--mpi="$mpi" --distribution=block:block --kill-on-bad-exit=0 --wait=120)
    [[ -z $TSM_CPU_BIND ]] || arguments+=(--cpu-bind="$TSM_CPU_BIND")
    # shellcheck disable=SC2206  # blanks separate arguments
    arguments+=($TSM_SRUN_ARGUMENTS)
    say "starting $SLURM_NTASKS ranks: srun ${arguments[*]} (backend $backend)"

    [[ $mpi == none ]] || number_steps_anew
    outcome_before=$(cat "$folder/outcome.json" 2>/dev/null || true)
    srun_code=75
    [[ -z $received ]] || return 0
    # shellcheck disable=SC2086  # blanks separate arguments
    srun "${arguments[@]}" "${container[@]}" "$TSM_PYTHON" ${TSM_RANK_PROGRAM:-train.py --run} "$folder" &
    srun_pid=$!
    # A signal interrupts `wait`, so wait again.
    while kill -0 "$srun_pid" 2>/dev/null; do
        wait "$srun_pid" && srun_code=0 || srun_code=$?
    done
}

# Skip the step numbers of earlier starts. Slurm numbers steps from 0 in each start of a job, and after a crash PMIx's data for a
# step number stays on the node. A later start there would fail ("task launch failed", seen with Slurm 22.05).
number_steps_anew() {
    local start
    for ((start = 0; start < restarts; start++)); do
        srun --nodes=1 --ntasks=1 --mpi=none true || true
    done
}

# Handle a signal: srun forwards it to all ranks, which save at the same step and exit with 75.
receive() {
    received=$1
    if [[ -n $srun_pid ]]; then
        say "received SIG$1: telling the ranks to save and end"
        kill -USR1 "$srun_pid" 2>/dev/null || true
    else
        say "received SIG$1: not starting the ranks"
    fi
}

# shellcheck shell=bash
# What every batch script does: compose the configuration once, check the nodes, start the ranks, and queue the job again where
# that helps. Sourced by launch/*.sh inside a batch job; `run_job OVERRIDES` is all that they call.
#
# A job's folder is outputs/RUN_ID, with the job's id for a name unless run_id= says another. In it: SUCCESS once the run is
# complete, outcome.json with how the newest start ended. Exit codes: docs/operating.md.
set -euo pipefail

run_job() {
    cd "${checkout:?the folder of the project}"
    # Signals come to this shell alone (sbatch --signal=B:), whatever it is doing.
    srun_pid='' received=''
    trap 'receive USR1' USR1
    trap 'receive TERM' TERM
    load_site
    name_folder "$@"
    leave_if_over
    set_environment
    announce
    compose "$@"
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

say() {
    echo "[$(date +%FT%T) $(hostname)] $*"
}

# The run cannot go on, and starting it again changes nothing.
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
    # shellcheck disable=SC2086  # blanks separate them
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

# Command-line overrides that the folder's name depends on; the last one counts, as in Hydra.
name_folder() {
    run_id=$SLURM_JOB_ID outputs=outputs
    local override
    for override; do
        case $override in
            run_id=*) run_id=${override#*=} ;;
            outputs=*) outputs=${override#*=} ;;
        esac
    done
    [[ $outputs == /* ]] || outputs=$checkout/$outputs
    folder=$outputs/$run_id
    restarts=${SLURM_RESTART_COUNT:-0}
}

leave_if_over() {
    if [[ -e $folder/SUCCESS ]]; then
        say "$folder is complete (SUCCESS is there): nothing to do"
        exit 0
    fi
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

# Of the first node, "6(x256)" being six on each of them.
tasks_per_node() {
    echo "${SLURM_TASKS_PER_NODE%%[(,]*}"
}

# Ranks read config.yaml, so that they are told the same, and a job that is queued again is told what it was told first, however
# the checkout has changed since. A new job with the same run_id composes anew.
compose() {
    if ((restarts > 0)) && [[ -e $folder/config.yaml ]]; then
        say "going on by $folder/config.yaml"
        return
    fi
    local code=0
    in_container "$TSM_PYTHON" plan.py "pipeline.workers=$workers" "$@" "run_id=$run_id" "outputs=$outputs" \
        "distributed.world_size=$SLURM_NTASKS" plan.write_config=true || code=$?
    if ((code)); then
        say "error: the job cannot start (exit code $code), for the reasons above" >&2
        exit "$code"
    fi
}

# A command in the batch script's own place: on its node, in the container where there is one.
in_container() {
    if [[ -z $TSM_CONTAINER_IMAGE ]]; then
        "$@"
    else
        srun --nodes=1 --ntasks=1 --overlap "${container[@]}" "$@"
    fi
}

# A value of config.yaml, which OmegaConf has written: two levels, one key a line.
config_value() {
    sed -n "/^$1:/,/^[^ ]/s/^  $2: //p" "$folder/config.yaml"
}

check_nodes() {
    [[ $TSM_PREFLIGHT != off ]] || return 0
    local code=0 bad=$folder/bad_nodes.txt
    rm -f "$bad"
    slurm/preflight.sh --bad-nodes-file "$bad" -- "${container[@]}" ${TSM_CPU_BIND:+--cpu-bind="$TSM_CPU_BIND"} || code=$?
    ((code)) || return 0
    if [[ $TSM_PREFLIGHT == exclude && -s $bad ]]; then
        exclude_and_requeue "$(paste -sd, "$bad")"
    fi
    say "error: preflight found what is named above (exit code $code). Fix: sbatch --exclude=NODES, or TSM_PREFLIGHT=exclude" >&2
    exit 2
}

stage() {
    [[ -z $TSM_ENVIRONMENT_ARCHIVE ]] || stage_environment
    [[ $TSM_STAGE_DATA != on ]] || stage_data "$(data_root)"
}

data_root() {
    local root
    root=$(config_value data root)
    [[ $root == /* ]] || root=$checkout/$root
    echo "$root"
}

# How srun must start them follows from the configuration.
start_ranks() {
    local backend controller mpi=none
    backend=$(config_value distributed backend) controller=$(config_value distributed controller)
    [[ $backend != horovod || $controller == gloo ]] || mpi=$TSM_SRUN_MPI
    # In blocks, so that neighbours in rank, which share a batch-norm group, share a node.
    # A rank that fails does not end the others: they hear why from the monitor, write it down, and end by themselves.
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
    while kill -0 "$srun_pid" 2>/dev/null; do # again, where a signal has interrupted the waiting
        wait "$srun_pid" && srun_code=0 || srun_code=$?
    done
}

# Steps are numbered from 0 in each start of a job, and what PMIx keeps on a node under a step's number outlives a crash there: a later
# start on that node would fail ("task launch failed", seen with Slurm 22.05). So each start uses other numbers.
number_steps_anew() {
    local start
    for ((start = 0; start < restarts; start++)); do
        srun --nodes=1 --ntasks=1 --mpi=none true || true
    done
}

# srun hands it on to every rank; they save at the same step and end, with 75.
receive() {
    received=$1
    if [[ -n $srun_pid ]]; then
        say "received SIG$1: telling the ranks to save and end"
        kill -USR1 "$srun_pid" 2>/dev/null || true
    else
        say "received SIG$1: not starting the ranks"
    fi
}

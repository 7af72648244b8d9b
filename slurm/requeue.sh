# shellcheck shell=bash
# Determine how a start ended, and requeue the job if that helps. Sourced by job.sh.
# shellcheck disable=SC2154  # variables are job.sh's

# Exit by the outcome in the run folder. srun's exit code is not reliable: 137 for any killed rank, and 0 for some lost nodes.
conclude() {
    if slurm_ends_it; then
        say "Slurm itself has ended this start: a lost node (it queues the job again), scancel, or the end of its time; run_id=$run_id goes on"
        exit 75
    fi
    local outcome=$folder/outcome.json in_vain=$folder/starts_without_word.txt code='' reason
    if [[ -e $outcome && $(cat "$outcome") != "$outcome_before" ]]; then
        # Nothing but a number may get into bash's arithmetic, which runs commands: others may be able to write the run folder.
        code=$(sed -n 's/.*"exit_code": \([1-9][0-9]\{0,2\}\|0\),.*/\1/p' "$outcome")
    fi
    if [[ $code =~ ^[0-9]+$ ]]; then
        # A log is read on terminals, which obey control characters. JSON has none of its own.
        reason=$(sed -n 's/.*"reason": "\(.*\)", "time_s".*/\1/p' "$outcome" | tr --delete '[:cntrl:]')
        rm -f "$in_vain" || true
    elif ((srun_code >= 2 && srun_code <= 5)); then
        # train.py refused to start, before it could write an outcome.
        code=$srun_code reason="see above"
    elif [[ -n $received ]]; then
        # The signal came before the ranks had a run folder, or before they were started.
        code=75 reason="SIG$received came before the first step"
    else
        # The outcome was lost with the batch script's node, or the ranks never started: Slurm cannot start ranks on a node, or
        # the environment is broken.
        say "start $((restarts + 1)) left no word; srun ended with $srun_code" >>"$in_vain" || true
        code=75 reason="nobody was left to say why; srun ended with $srun_code"
        if (($(wc -l <"$in_vain" || echo 0) > 2)); then
            code=5 reason="no word from three starts: see above, and $in_vain"
        fi
    fi
    say "this start ended with $code: $reason"
    if ((code != 75)); then
        ((code == 0)) || write_report
        exit "$code"
    fi
    requeue
}

# Write report.html of a run that failed. The monitor starts that too, but Slurm may end it with the step.
write_report() {
    in_container "$TSM_PYTHON" report.py "$folder" || true
}

requeue() {
    if ((restarts >= TSM_MAX_RESTARTS)); then
        say "not queued again: TSM_MAX_RESTARTS=$TSM_MAX_RESTARTS; run_id=$run_id goes on"
    elif scontrol requeue "$SLURM_JOB_ID"; then
        say "job $SLURM_JOB_ID is queued again"
    else
        say "this site does not queue jobs again. Fix: sbatch --dependency=afterany:$SLURM_JOB_ID ... run_id=$run_id"
    fi
    exit 75
}

# Succeed if Slurm itself ends the job: a cancelled or preempted job is no longer RUNNING when its ranks get the signal. Such a job
# is not requeued from here.
slurm_ends_it() {
    [[ " $(scontrol --oneliner show job "$SLURM_JOB_ID")" != *" JobState=RUNNING"* ]]
}

# Requeue the job without the given nodes; does not return.
exclude_and_requeue() {
    local nodes=$1
    ((restarts < TSM_MAX_RESTARTS)) || requeue
    say "queueing job $SLURM_JOB_ID again, without $nodes"
    # Slurm excludes nodes only from pending jobs, and requeueing sends SIGTERM to this script. Ignore it until all is done.
    trap '' TERM
    local before
    before=$(scontrol --oneliner show job "$SLURM_JOB_ID" | sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p')
    [[ -z $before || $before == "(null)" ]] || nodes=$before,$nodes
    scontrol requeuehold "$SLURM_JOB_ID"
    scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=$nodes"
    scontrol release "$SLURM_JOB_ID"
    exit 75
}

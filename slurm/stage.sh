# shellcheck shell=bash
# Copies to the disk of every node, so that a thousand ranks do not read the same files of a shared file system at once: the
# environment (an archive of slurm/pack_environment.sh, by sbcast) and the data set (a folder). Sourced by job.sh.
# shellcheck disable=SC2154  # variables are job.sh's
staged_on_node=$TSM_LOCAL_DISK/tsm-staged-$SLURM_JOB_ID

# Each node unpacks the archive and starts its interpreter once; one that cannot ends the job, for ranks that differ in their
# packages are worse than none.
stage_environment() {
    local target=$staged_on_node/environment archive=$staged_on_node.tar.gz started_s=$SECONDS
    if ! sbcast --force "$TSM_ENVIRONMENT_ARCHIVE" "$archive"; then
        refuse "cannot send $TSM_ENVIRONMENT_ARCHIVE to $TSM_LOCAL_DISK of all nodes. Fix: make room, or TSM_ENVIRONMENT_ARCHIVE="
    fi
    # shellcheck disable=SC2016  # the nodes expand it
    on_each_node 'mkdir -p "$1" && tar --extract --gzip --file "$2" --directory "$1" && rm "$2" && "$1/bin/python" -c "import sys" \
        || { echo "$(hostname): cannot unpack $2 to $1" >&2; exit 1; }' "$target" "$archive" \
        || refuse "the environment is not whole on the nodes named above. Fix: sbatch --exclude=NODES, or TSM_ENVIRONMENT_ARCHIVE="
    export TSM_PYTHON=$target/bin/python
    say "the environment is on each node's disk ($((SECONDS - started_s)) s): $target"
}

# Each node copies as much as it has room for; its ranks read the rest from the shared folder: slower, and the same clips.
stage_data() {
    local source=$1 started_s=$SECONDS
    export TSM_STAGED_FILES=$staged_on_node/data
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --mpi=none "${container[@]}" \
        "$TSM_PYTHON" "$checkout/prepare.py" stage --root "$source" --to "$TSM_STAGED_FILES" ||
        say "staging failed on some nodes: they read the shared folder"
    say "staged $source ($((SECONDS - started_s)) s)"
}

# Behind the ranks: the next job finds the disk as this one did.
unstage() {
    # shellcheck disable=SC2016
    on_each_node 'rm -rf "$1"' "$staged_on_node" || say "cannot remove $staged_on_node on some nodes"
}

# Run a bash program with arguments once on every node.
on_each_node() {
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --mpi=none bash -c "$1" bash "${@:2}"
}

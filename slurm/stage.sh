# shellcheck shell=bash
# Copy the environment (an archive of slurm/pack_environment.sh, by sbcast) and the data set (a folder) to the disk of every node,
# so that a thousand ranks do not read the same files of a shared file system at once. Sourced by job.sh.
# shellcheck disable=SC2154  # variables are job.sh's

# The folder on each node, once it is made. Ranks run the Python in it, so no other user may make, change or replace it.
staged_on_node=''

# Make the folder on each node: mode 700, and a random name that no other user can take first. What an earlier start of this job left
# is used again.
make_staging_folder() {
    [[ -z $staged_on_node ]] || return 0
    staged_on_node=$TSM_LOCAL_DISK/tsm-staged-$SLURM_JOB_ID-$(random_name)
    # shellcheck disable=SC2016  # the nodes expand it
    on_each_node '
        fail() { echo "$(hostname): $*" >&2; exit 1; }
        is_private() { [[ -d $1 && ! -L $1 && -O $1 ]] && (((8#$(stat --format=%a "$1") & 8#77) == 0)); }
        disk=${1%/*}
        mode=$(stat --dereference --format=%a "$disk") || fail "no local disk"
        (((8#$mode & 8#1002) != 8#2)) || fail "other users can replace folders in $disk (mode $mode). Fix: chmod +t $disk"
        for left in "${1%-*}"-*; do
            ! is_private "$left" || mv --no-target-directory "$left" "$1" 2>/dev/null || true
        done
        error=$(mkdir --mode=700 "$1" 2>&1) || is_private "$1" ||
            fail "$error; $(stat --format="it is a %F of %U (user id %u), mode %a" "$1" 2>&1)"
    ' "$staged_on_node" ||
        refuse "no folder for staged files on the nodes named above. Fix: as said there, sbatch --exclude=NODES, or TSM_LOCAL_DISK=FOLDER"
}

random_name() {
    od --address-radix=n --format=x8 --read-bytes=8 /dev/urandom | tr --delete ' \n'
}

# Unpack the archive on each node and start its interpreter once. A node that fails ends the job, so that no ranks run with
# different packages.
stage_environment() {
    make_staging_folder
    local target=$staged_on_node/environment archive=$staged_on_node/environment.tar.gz started_s=$SECONDS
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

# Copy as much data to each node as its disk has room for. Its ranks read the rest, more slowly, from the shared folder.
stage_data() {
    local source=$1 started_s=$SECONDS
    make_staging_folder
    export TSM_STAGED_FILES=$staged_on_node/data
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --mpi=none "${container[@]}" \
        "$TSM_PYTHON" "$checkout/prepare.py" stage --root "$source" --to "$TSM_STAGED_FILES" ||
        say "staging failed on some nodes: they read the shared folder"
    say "staged $source ($((SECONDS - started_s)) s)"
}

# Remove the staged files after the ranks have ended.
unstage() {
    # shellcheck disable=SC2016
    on_each_node 'rm -rf "$1"' "$staged_on_node" || say "cannot remove $staged_on_node on some nodes"
}

# Run a bash program with arguments once on each node.
on_each_node() {
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --mpi=none bash -c "$1" bash "${@:2}"
}

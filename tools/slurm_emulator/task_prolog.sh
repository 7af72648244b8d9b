#!/usr/bin/env bash
# Slurm's TaskProlog: runs before each task and batch script on a node. Each line `export NAME=VALUE` that it prints sets a variable
# of the task. It puts the emulated nvidia-smi on PATH and exports the lines NAME=VALUE of /mnt/local/task_environment, by which a
# test makes one node differ from the others.
set -euo pipefail

programs=$(cd "$(dirname "${BASH_SOURCE[0]}")/bin" && pwd)
[[ :$PATH: == *:$programs:* ]] || echo "export PATH=$programs:$PATH"

changes=/mnt/local/task_environment
if [[ -r $changes ]]; then
    while IFS= read -r line; do
        [[ $line != *=* ]] || echo "export $line"
    done <"$changes"
fi

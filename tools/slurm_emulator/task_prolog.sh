#!/usr/bin/env bash
# What Slurm runs before each task and batch script on a node: lines `export NAME=VALUE` that it prints become the task's
# environment. It puts the stand-in for nvidia-smi on the PATH, and hands on /mnt/local/task_environment, lines NAME=VALUE by
# which a test makes one node unlike the others.
set -euo pipefail

programs=$(cd "$(dirname "${BASH_SOURCE[0]}")/bin" && pwd)
[[ :$PATH: == *:$programs:* ]] || echo "export PATH=$programs:$PATH"

changes=/mnt/local/task_environment
if [[ -r $changes ]]; then
    while IFS= read -r line; do
        [[ $line != *=* ]] || echo "export $line"
    done <"$changes"
fi

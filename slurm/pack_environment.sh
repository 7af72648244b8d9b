#!/usr/bin/env bash
# usage: slurm/pack_environment.sh FILE.tar.gz [ENVIRONMENT]
# Packs a virtual environment (.venv) for TSM_ENVIRONMENT_ARCHIVE: job.sh sends it to each node's disk before ranks start. The
# interpreter that it was made with, which it links to, must be on every node.
set -euo pipefail

archive=${1:?usage: slurm/pack_environment.sh FILE.tar.gz [ENVIRONMENT]}
environment=${2:-$(dirname "${BASH_SOURCE[0]}")/../.venv}
[[ -e $environment/pyvenv.cfg ]] || {
    echo "pack: $environment is no virtual environment. Fix: make setup horovod" >&2
    exit 2
}
tar --create --gzip --file "$archive.part" --directory "$environment" .
mv "$archive.part" "$archive"
echo "$archive: $(du --human-readable "$archive" | cut -f 1)"

#!/usr/bin/env bash
# usage: slurm/pack_environment.sh FILE.tar.gz [ENVIRONMENT]
# Pack a virtual environment (.venv) for TSM_ENVIRONMENT_ARCHIVE: job.sh copies it to each node's disk before the ranks start. The
# environment links to the interpreter that created it, which must exist on every node.
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

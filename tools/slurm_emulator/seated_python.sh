#!/usr/bin/env bash
# TSM_PYTHON for more ranks than one machine has room for: no more than TSM_SEATS (4) of them run at a time, the others wait in a
# shell of a megabyte. Rank 0, which others may wait for, always runs. Nothing that all ranks do together gets through.
set -euo pipefail

python=$(dirname "${BASH_SOURCE[0]}")/../../.venv/bin/python
rank=${SLURM_PROCID:-0}
((rank > 0)) || exec "$python" "$@"
exec flock --no-fork "/tmp/tsm-seat-$((rank % ${TSM_SEATS:-4}))" "$python" "$@"

#!/usr/bin/env bash
# A TSM_PYTHON for more ranks than fit into one machine's memory: at most TSM_SEATS (4) ranks run at the same time, the others wait in
# a shell of 1 MB. Rank 0 always runs, since other ranks may wait for it. Collective operations would deadlock. The seats are files in
# TSM_LOCAL_DISK, which all emulated nodes share.
set -euo pipefail

python=$(dirname "${BASH_SOURCE[0]}")/../../.venv/bin/python
rank=${SLURM_PROCID:-0}
((rank > 0)) || exec "$python" "$@"
exec flock --no-fork "${TSM_LOCAL_DISK:?}/seat-$((rank % ${TSM_SEATS:-4}))" "$python" "$@"

#!/usr/bin/env bash
# Run bash -n and shellcheck on every shell script that git tracks or would add.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts=()
while IFS= read -r script; do
    [[ -f $script ]] && scripts+=("$script")
done < <(git ls-files --cached --others --exclude-standard -- '*.sh' '*.sbatch' .ci/run 'tools/slurm_emulator/bin/*' | sort -u)
if ((${#scripts[@]} == 0)); then
    echo "lint: no shell scripts found" >&2
    exit 1
fi

for script in "${scripts[@]}"; do
    bash -n "$script"
done

if command -v shellcheck >/dev/null; then
    shellcheck --external-sources --source-path=SCRIPTDIR "${scripts[@]}"
    echo "shellcheck: ${#scripts[@]} scripts clean"
elif [[ ${FORBID_SKIPS:-0} == 1 ]]; then
    echo "lint: shellcheck is not installed and FORBID_SKIPS=1; fix: apt-get install shellcheck" >&2
    exit 1
else
    echo "================================================================================" >&2
    echo "SKIPPED: shellcheck is not installed, ${#scripts[@]} scripts were only parsed by bash -n." >&2
    echo "  fix: apt-get install shellcheck" >&2
    echo "================================================================================" >&2
fi

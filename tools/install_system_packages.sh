#!/usr/bin/env bash
# Install the missing packages of tools/system_packages.txt. Fast if none is missing. Without Debian or root, print the missing
# packages and exit 0: tests that need them are then skipped, with that reason.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mapfile -t wanted < <(sed -e 's/#.*//' -e 's/[[:space:]]//g' -e '/^$/d' "$here/system_packages.txt")

if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
    echo "system packages: not a Debian system, so nothing is installed; the tests want the equivalents of: ${wanted[*]}"
    exit 0
fi

missing=()
for package in "${wanted[@]}"; do
    # Node.js of another origin than Debian brings npm, and conflicts with Debian's.
    [[ $package == npm ]] && command -v npm >/dev/null && continue
    status=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
    [[ $status == installed ]] || missing+=("$package")
done

if ((${#missing[@]} == 0)); then
    echo "system packages: all ${#wanted[@]} are here"
    exit 0
fi
if ((EUID != 0)); then
    echo "system packages: NOT INSTALLED (not root): ${missing[*]}"
    echo "  fix: sudo apt-get install ${missing[*]}"
    exit 0
fi

echo "system packages: installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
# Another apt may run, for example in a new machine's first minutes: wait for its lock instead of failing.
apt=(apt-get -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 -qq)
"${apt[@]}" update
"${apt[@]}" install --yes --no-install-recommends "${missing[@]}" </dev/null
echo "system packages: installed ${missing[*]}"

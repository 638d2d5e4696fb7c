#!/usr/bin/env bash
# Installs what some tests need beside Python packages: Slurm with munge, and Chromium. As root, with apt-get, and only
# what is missing. Never fails: tests that miss a program are skipped, and `make test` ends with the reason.
set -uo pipefail

packages=()
for program in sbatch slurmctld slurmd; do
    command -v "$program" > /dev/null || { packages+=(slurm-wlm); break; }
done
command -v munged > /dev/null || packages+=(munge)
command -v chromium > /dev/null || command -v chromium-browser > /dev/null || command -v google-chrome > /dev/null ||
    packages+=(chromium)
[ ${#packages[@]} -gt 0 ] || exit 0

if [ "$(id -u)" -ne 0 ] || ! command -v apt-get > /dev/null; then
    echo "Tests of ${packages[*]} will be skipped: not installed, and installing them takes root and apt-get." >&2
    exit 0
fi

echo "Installing ${packages[*]} for the tests ..."
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
apt-get update > "$log" 2>&1 || { echo "apt-get update failed:"; tail -n 3 "$log"; } >&2
for package in "${packages[@]}"; do
    timeout 400 apt-get install --yes --no-install-recommends "$package" > "$log" 2>&1 ||
        { echo "Tests of $package will be skipped: apt-get install failed:"; tail -n 3 "$log"; } >&2
done
exit 0

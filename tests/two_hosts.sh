#!/usr/bin/env bash
# SFT and DPO over two hosts, and what happens where a host or its link fails: real sshd, pdsh and gloo between two network namespaces of
# this machine that a virtual cable joins, each with processes, mounts and a name of its own. Takes some twelve minutes;
# names of claims (two_hosts.py has them) choose among them.
# Needs root on Linux. Debian's packages for ssh, pdsh, Slurm and libfaketime are installed where they are missing.
[ "${1:-}" != --help ] || exec sed -nE '2,/^[^#]/s/^#( |$)//p' "${BASH_SOURCE[0]}"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export POSTTRAIN_EXTRAS=test
source launch/env.sh
[ "$(id -u)" = 0 ] || {
    echo "two_hosts.sh: needs root, to make network namespaces" >&2
    exit 1
}
missing=()
for pair in sshd:openssh-server ssh:openssh-client pdsh:pdsh ip:iproute2 unshare:util-linux pkill:procps \
    slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client munged:munge; do
    command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
done
compgen -G "/usr/lib/*/faketime/libfaketime.so.1" >/dev/null || missing+=(libfaketime)
if [ ${#missing[@]} -gt 0 ]; then
    echo "two_hosts.sh: installing ${missing[*]}"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -qq -y --no-install-recommends "${missing[@]}"; } >/dev/null
fi
exec python tests/two_hosts.py "$@"

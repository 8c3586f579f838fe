#!/bin/bash
# Starts SLURM on this machine alone: munge, slurmctld and slurmd on the loopback device, for the tests of the launcher.
# Needs Debian's munge and slurm-wlm, and root:  apt-get install -y munge slurm-wlm
#   scripts/slurm_on_loopback.sh start | stop
set -euo pipefail

state=${SLURM_LOOPBACK:-/tmp/slurm-loopback}
export SLURM_CONF="$state/slurm.conf"

need() {
    command -v "$1" >/dev/null || { echo "SLURM cannot start: $1 is not installed" >&2; exit 3; }
}

configure() {
    mkdir -p "$state"/{ctld,d}
    cat >"$SLURM_CONF" <<CONF
ClusterName=loopback
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
SlurmctldPort=16817
SlurmdPort=16818
AuthType=auth/munge
StateSaveLocation=$state/ctld
SlurmdSpoolDir=$state/d
SlurmctldPidFile=$state/slurmctld.pid
SlurmdPidFile=$state/slurmd.pid
SlurmctldLogFile=$state/slurmctld.log
SlurmdLogFile=$state/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
MpiDefault=none
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
}

start() {
    need munged; need slurmctld; need slurmd
    [ -f /etc/munge/munge.key ] || mungekey --create
    mkdir -p /run/munge && chown munge: /run/munge
    pgrep -x munged >/dev/null || runuser -u munge -- munged
    configure
    slurmctld -f "$SLURM_CONF"
    slurmd -f "$SLURM_CONF"
    for _ in $(seq 30); do
        if sinfo -h -o %T 2>/dev/null | grep -q idle; then
            echo "export SLURM_CONF=$SLURM_CONF"
            return
        fi
        sleep 1
    done
    echo "SLURM did not come up: $(tail -n 3 "$state"/*.log)" >&2
    exit 3
}

stop() {
    for daemon in slurmd slurmctld; do
        [ -f "$state/$daemon.pid" ] && kill "$(cat "$state/$daemon.pid")" || true
    done
}

"${1:-start}"

#!/usr/bin/env bash
# The image's entry point.
#
#   sshd       the server by which a launcher starts ranks here, in the foreground, without root
#   COMMAND    runs it; but where there is a host file, not before every host in it has a name and answers
#
# DISTTRAIN_HOSTFILE (/etc/mpi/hostfile), DISTTRAIN_SSH_PORT (2222)
# DISTTRAIN_WAIT_SECONDS (300)    then it gives up, and names the hosts
# DISTTRAIN_WAIT_HOSTS (all)      so many hosts are enough
set -euo pipefail

hostfile=${DISTTRAIN_HOSTFILE:-/etc/mpi/hostfile}
port=${DISTTRAIN_SSH_PORT:-2222}
seconds=${DISTTRAIN_WAIT_SECONDS:-300}

say() { printf 'entrypoint: %s\n' "$*" >&2; }

resolves() { timeout 5 getent ahosts "$1" >/dev/null; }

# shellcheck disable=SC2016  # the inner shell is the one that fills in
answers() { timeout 5 bash -c ': <"/dev/tcp/$0/$1"' "$1" "$port" 2>/dev/null; }

wait_for_hosts() {
  local hosts missing needed index
  mapfile -t hosts < <(sed -E 's/#.*//; s/^[[:space:]]+//; s/[[:space:]:].*//; /^$/d' "$hostfile")
  missing=("${hosts[@]}")
  needed=${DISTTRAIN_WAIT_HOSTS:-${#hosts[@]}}
  while ((${#hosts[@]} - ${#missing[@]} < needed)); do
    ((SECONDS < seconds)) || give_up "$needed" "${missing[@]}"
    for index in "${!missing[@]}"; do
      ((SECONDS < seconds)) || break
      if answers "${missing[index]}"; then unset "missing[index]"; fi
    done
    sleep 0.5
  done
}

give_up() {
  local host
  for host in "${@:2}"; do
    if resolves "$host"; then
      say "$host does not answer on port $port: look whether it runs (kubectl get pods), and at its log (kubectl logs)"
    else
      say "$host has no address: look whether its pod exists (kubectl get pods), and at the Service"
    fi
  done
  say "gave up after $seconds s; $1 hosts of $hostfile were to answer"
  exit 1
}

# The processes that know their rank from one of these variables.
ranks() { grep -lszE "^(${DISTTRAIN_RANK_VARIABLES:-OMPI_COMM_WORLD_RANK|HOROVOD_RANK})=" /proc/[0-9]*/environ | cut -d/ -f3; }

# The end of a pod is told to its first process only. Ranks hear of it here, and have until the grace period ends to save.
stop() {
  trap '' TERM INT
  ranks | xargs --no-run-if-empty kill -TERM 2>/dev/null || true  # some may have ended by now
  while [ -n "$(ranks)" ]; do sleep 0.2; done
  jobs -p | xargs --no-run-if-empty kill -TERM 2>/dev/null || true
  exit 0
}

serve() {
  trap stop TERM INT  # before there is anything to stop: a pod may be taken away as soon as it is there
  # A full path, since sshd starts itself again for every connection.
  "${DISTTRAIN_SSHD:-/usr/sbin/sshd}" -D -e -f /etc/disttrain/sshd_config -p "$port" &
  wait $! || true
  exit 1
}

if [ "${1:-}" = sshd ]; then serve; fi
if [ -e "$hostfile" ]; then wait_for_hosts; fi
exec "$@"

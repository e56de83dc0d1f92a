#!/usr/bin/env bash
# One command on every host of a Cloud TPU slice. See launch/README.md.
#   bash launch/tpu_pod.sh setup                          copies the project, installs it
#   bash launch/tpu_pod.sh start irg train ... --distributed
#   bash launch/tpu_pod.sh log | status | stop
# Variables:
#   IRG_TPU, IRG_ZONE  name and zone of the slice, as gcloud knows them (required)
#   IRG_PROJECT        the cloud project, if not gcloud's default
#   IRG_REMOTE         folder on the hosts (default irg_jax, in the home folder)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
tpu=${IRG_TPU:?set IRG_TPU to the name of the TPU slice}
zone=${IRG_ZONE:?set IRG_ZONE to its zone}
remote=${IRG_REMOTE:-irg_jax}
where=(--zone "$zone" --worker=all)
if [[ -n ${IRG_PROJECT:-} ]]; then
  where+=(--project "$IRG_PROJECT")
fi

usage() {
  sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
}

# Runs a line of shell on every host, in the project's folder.
on_all() {
  gcloud compute tpus tpu-vm ssh "$tpu" "${where[@]}" \
    --command "cd $(printf '%q' "$remote") && $1"
}

setup() {
  local archive
  archive=$(mktemp --suffix=.tar.gz)
  # shellcheck disable=SC2064  # the name is known now
  trap "rm -f $(printf '%q' "$archive")" EXIT
  tar -C "$root" --exclude=./.git --exclude=./.venv --exclude=./out --exclude='__pycache__' \
    -czf "$archive" .
  gcloud compute tpus tpu-vm scp "$archive" "$tpu:irg_jax.tar.gz" "${where[@]}"
  gcloud compute tpus tpu-vm ssh "$tpu" "${where[@]}" \
    --command "mkdir -p $(printf '%q' "$remote") && tar -C $(printf '%q' "$remote") -xzf irg_jax.tar.gz"
  on_all 'source launch/env.sh && irg_install tpu'
}

# What a host says of itself. Single quotes: expanded there, not here.
# shellcheck disable=SC2016
is_running='[[ -f run.pid ]] && kill -0 "$(<run.pid)" 2>/dev/null'
# shellcheck disable=SC2016
say_status='echo "$(hostname): $(tail -n 1 run.log)"'

# A session of its own, so that the command outlives the connection that starts it.
start() {
  local command
  command=$(printf '%q ' "$@")
  on_all "if $is_running; then echo 'already running: stop it first' >&2; exit 1; fi
    source .venv/bin/activate
    setsid nohup bash -c 'echo \$\$ >run.pid; exec \"\$@\"' irg $command >run.log 2>&1 </dev/null &"
  echo "started; bash launch/tpu_pod.sh log follows it"
}

case ${1:-} in
  setup) setup ;;
  start)
    shift
    [[ $# -gt 0 ]] || usage
    start "$@"
    ;;
  log) on_all 'tail -n 20 -F run.log' ;;
  status) on_all "if $is_running; then echo \"\$(hostname): running\"; fi; $say_status" ;;
  stop) on_all "$is_running && kill -TERM \"\$(<run.pid)\"" ;; # training saves, then ends
  *) usage ;;
esac

#!/usr/bin/env bash
# One command on every host of one or more Cloud TPU slices, as a queued resource (gcloud).
#   bash launch/tpu.sh [--dry-run] run COMMAND...   such as irg train ... --distributed
#   bash launch/tpu.sh [--dry-run] log | status | stop
# `run` asks for the slices and stays: after a preemption it asks again, and each host starts the
# same command. It ends when the command has ended, and gives the slices back. It may be stopped
# and started again at any time; the hosts do not need it. `stop` lets training save, then gives
# the slices back. Variables:
#   IRG_JOB        name of the queued resource
#   IRG_ZONE       zone of the slices
#   IRG_TYPE       accelerator type, such as v6e-64 or v5p-128
#   IRG_IMAGE      container image that the hosts run
#   IRG_LOGS       folder in a bucket for the output of the hosts: gs://BUCKET/logs/irg
#   IRG_SLICES     number of slices (default 1)
#   IRG_SPOT       1: spot capacity
#   IRG_RESTARTS   starts after a failure that is no preemption (default 20)
#   IRG_PROJECT    the cloud project, if not gcloud's default
#   IRG_RUNTIME    TPU software version (default: the one for IRG_TYPE)
#   IRG_FLAGS      more flags for gcloud compute tpus queued-resources create
#   IRG_POLL       seconds between two looks at the slices (default 60)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$here/common.sh"

irg_options "$@"
set -- ${irg_rest[@]+"${irg_rest[@]}"}
verb=${1:-}
[[ $verb =~ ^(run|log|status|stop)$ ]] || irg_fail "${verb:-no verb}: want run, log, status or stop"
shift
irg_need IRG_JOB IRG_ZONE IRG_LOGS
irg_match IRG_JOB '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' irg-1
irg_match IRG_LOGS 'gs://.+' gs://BUCKET/logs/irg
logs=${IRG_LOGS%/}
where=(--zone="$IRG_ZONE" ${IRG_PROJECT:+--project="$IRG_PROJECT"})

queue() {
  local verb=$1
  shift
  irg_run gcloud compute tpus queued-resources "$verb" "$@" "${where[@]}"
}

# The state of the request, empty if there is none; fails where gcloud does.
state() {
  gcloud compute tpus queued-resources list "${where[@]}" \
    --filter="name~/$IRG_JOB\$" --format='value(state.state)'
}

# The exit status of the command, empty while it runs.
ended() {
  gcloud storage cat "$logs/ended" 2>/dev/null || true
}

runtime() {
  case $IRG_TYPE in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v[234]-*) echo tpu-ubuntu2204-base ;;
    *) irg_fail "IRG_TYPE=$IRG_TYPE: no TPU software is known; set IRG_RUNTIME, or use gke.sh" ;;
  esac
}

# What each host runs at every boot: tpu_host.sh with its variables and the command.
startup() {
  printf '#!/usr/bin/env bash\n'
  printf '%s=%q\n' IRG_IMAGE "$IRG_IMAGE" IRG_LOGS "$logs" IRG_RESTARTS "${IRG_RESTARTS:-20}"
  printf 'set --'
  printf ' %q' "$@"
  printf '\n'
  sed 1d "$here/tpu_host.sh"
}

create() {
  local nodes=(--node-id="$IRG_JOB") flags=()
  ((${IRG_SLICES:-1} == 1)) || nodes=(--node-count="$IRG_SLICES" --node-prefix="$IRG_JOB")
  read -ra flags <<<"${IRG_FLAGS:-}"
  queue create "$IRG_JOB" "${nodes[@]}" --accelerator-type="$IRG_TYPE" \
    --runtime-version="$version" ${IRG_SPOT:+--spot} \
    --scopes=https://www.googleapis.com/auth/cloud-platform \
    --metadata-from-file=startup-script="$script" ${flags[@]+"${flags[@]}"}
}

remove() {
  queue delete "$IRG_JOB" --force --quiet
}

# One look: asks again for slices that are gone. Fails while the command runs.
look() {
  local now
  now=$(state) || return 1 # no network: look again later
  [[ $now == "$before" ]] || echo "$(date +%FT%T) $IRG_JOB: ${now:-not there}" >&2
  before=$now
  status=$(ended)
  if [[ $status =~ ^[0-9]+$ ]]; then
    [[ -z $now ]] || remove
    return
  fi
  case $now in
    FAILED | SUSPENDED) remove && create || true ;;
    '') create || true ;;
  esac
  return 1
}

run() {
  local before='' now status='' version
  irg_need IRG_TYPE IRG_IMAGE
  irg_command "$@"
  irg_kept "$@"
  version=${IRG_RUNTIME:-$(runtime)}
  script=$(mktemp)
  trap 'rm -f "$script"' EXIT
  startup "$@" >"$script"
  if [[ -n $irg_dry_run ]]; then
    create
    cat "$script"
    return
  fi
  now=$(state)
  if [[ -n $now ]]; then
    echo "$IRG_JOB is there: watching it. Its hosts go on with the command that they got" >&2
  else
    [[ -z $(ended) ]] || gcloud storage rm "$logs/ended" # of an earlier run
    create
  fi
  until look; do
    sleep "${IRG_POLL:-60}"
  done
  echo "$IRG_JOB: the command ended with status $status; its output is in $logs" >&2
  return "$status"
}

stop() {
  irg_run gcloud storage cp - "$logs/ended" <<<143 # so that `run` does not ask again
  queue ssh "$IRG_JOB" --node=all --worker=all --command='sudo docker stop -t 300 irg' || true
  remove
}

case $verb in
  run) run "$@" ;;
  log) queue ssh "$IRG_JOB" --node=0 --worker=0 --command='tail -n 50 -F /var/log/irg.log' ;;
  status)
    if [[ -z $irg_dry_run ]]; then
      now=$(state) status=$(ended)
      echo "$IRG_JOB: ${now:-not there}${status:+, ended with status $status}"
    fi
    irg_run gcloud storage cat "$logs/*.log" | tail -n 5
    ;;
  stop) stop ;;
esac

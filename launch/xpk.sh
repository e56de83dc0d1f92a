#!/usr/bin/env bash
# One command on every host of one or more TPU slices in a cluster that XPK made.
#   bash launch/xpk.sh [--dry-run] COMMAND...       such as irg train ... --distributed
# XPK starts the same command again after a preemption or a crash. Follow and end it with
# `xpk workload list` and `xpk workload delete`. Variables:
#   IRG_JOB        name of the workload
#   IRG_CLUSTER    name of the cluster
#   IRG_TYPE       TPU type of a slice, such as v6e-64 or v5p-128
#   IRG_IMAGE      container image that the hosts run
#   IRG_SLICES     number of slices (default 1)
#   IRG_RESTARTS   starts after a preemption or a crash (default 100)
#   IRG_SPOT       1: spot capacity, in clusters that make nodes themselves
#   IRG_ZONE, IRG_PROJECT   if not gcloud's defaults
#   IRG_FLAGS      more flags for xpk workload create
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

irg_options "$@"
set -- ${irg_rest[@]+"${irg_rest[@]}"}
irg_command "$@"
irg_kept "$@"
irg_need IRG_JOB IRG_CLUSTER IRG_TYPE IRG_IMAGE
irg_match IRG_JOB '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' irg-1
read -ra flags <<<"${IRG_FLAGS:-}"
command=$(printf ' %q' "$@")
# `exec`: XPK sends SIGTERM to a shell that runs the command.
irg_run xpk workload create --workload="$IRG_JOB" --cluster="$IRG_CLUSTER" \
  --tpu-type="$IRG_TYPE" --num-slices="${IRG_SLICES:-1}" --docker-image="$IRG_IMAGE" \
  --max-restarts="${IRG_RESTARTS:-100}" --termination-grace-period-seconds=300 \
  ${IRG_SPOT:+--spot} ${IRG_ZONE:+--zone="$IRG_ZONE"} ${IRG_PROJECT:+--project="$IRG_PROJECT"} \
  ${flags[@]+"${flags[@]}"} --command="exec$command"

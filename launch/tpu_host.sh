#!/usr/bin/env bash
# Runs on each host of a TPU slice at every boot, as root; launch/tpu.sh puts lines before it that
# set IRG_IMAGE, IRG_LOGS, IRG_RESTARTS and the command as arguments. Nothing else is needed on
# the host: TPU software versions bring Docker and gcloud.
set -uo pipefail
log=${IRG_LOG:-/var/log/irg.log}
pause=${IRG_PAUSE:-15}
export HOME=${HOME:-/root} PATH=$PATH:/snap/bin
exec >>"$log" 2>&1
echo "$(date +%FT%T) $(hostname): $*"

metadata() {
  curl -sf -H 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

# Only the first host of a slice writes to the bucket: an error on one host ends all, and each
# prints it.
push() {
  if [[ $worker == 0 ]]; then
    gcloud storage cp --quiet "$log" "$IRG_LOGS/$(hostname).log" >/dev/null 2>&1
  fi
}

image() {
  local registry=${IRG_IMAGE%%/*}
  docker image inspect "$IRG_IMAGE" >/dev/null 2>&1 && return
  if [[ $registry =~ ^(.+\.pkg\.dev|(.+\.)?gcr\.io)$ ]]; then
    gcloud auth print-access-token |
      docker login -u oauth2accesstoken --password-stdin "https://$registry"
  fi
  docker pull --quiet "$IRG_IMAGE"
}

worker=$(metadata agent-worker-number || echo 0)
until image; do # Docker or the network may not be up yet
  push
  sleep "$pause"
done
while sleep 60; do push; done &
pusher=$!
docker rm --force irg >/dev/null 2>&1 # of the boot before

# Status 143 is a SIGTERM, and training has saved: of `tpu.sh stop`, which says so in the bucket, or
# because one of the hosts goes away.
failures=0
while ((failures <= IRG_RESTARTS)); do
  docker run --rm --name irg --privileged --net=host --shm-size=32g --stop-timeout=300 \
    "$IRG_IMAGE" "$@"
  status=$?
  echo "$(date +%FT%T) $(hostname): ended with status $status"
  push
  case $status in
    0) break ;;
    143) gcloud storage cat "$IRG_LOGS/ended" >/dev/null 2>&1 && break ;;
    *) failures=$((failures + 1)) ;;
  esac
  sleep "$pause"
done
kill "$pusher"
if [[ $status != 143 && $worker == 0 ]]; then
  gcloud storage cp - "$IRG_LOGS/ended" <<<"$status"
fi

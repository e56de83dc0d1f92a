#!/usr/bin/env bash
# One command on every host of one or more TPU slices in Google Kubernetes Engine, as a JobSet.
#   bash launch/gke.sh [--dry-run] COMMAND...       such as irg train ... --distributed
# --dry-run prints the JobSet; it may be edited and applied with `kubectl apply -f`. Wants the
# JobSet controller (0.6 or newer) in the cluster, and a TPU node pool for each slice. Variables:
#   IRG_JOB           name of the JobSet
#   IRG_IMAGE         container image that the hosts run
#   IRG_ACCELERATOR   label of the node pools: tpu-v6e-slice, tpu-v5p-slice, tpu-v5-lite-podslice
#   IRG_TOPOLOGY      sides of a slice, such as 8x8 or 4x4x4
#   IRG_CHIPS         chips of a host (default 4)
#   IRG_SLICES        number of slices (default 1)
#   IRG_SPOT          1: spot nodes
#   IRG_RESTARTS      starts after a failure that is no preemption (default 20)
#   IRG_ACCOUNT       Kubernetes service account, with access to the bucket
#   IRG_QUEUE         local queue, where Kueue schedules
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

irg_options "$@"
set -- ${irg_rest[@]+"${irg_rest[@]}"}
irg_command "$@"
irg_kept "$@"
irg_need IRG_JOB IRG_IMAGE IRG_ACCELERATOR IRG_TOPOLOGY
irg_match IRG_JOB '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' irg-1
irg_match IRG_TOPOLOGY '[0-9]+x[0-9]+(x[0-9]+)?' 4x4x4
chips=${IRG_CHIPS:-4}
hosts=$((${IRG_TOPOLOGY//x/*} / chips))
((hosts * chips == ${IRG_TOPOLOGY//x/*})) ||
  irg_fail "IRG_TOPOLOGY=$IRG_TOPOLOGY cannot be split into hosts of IRG_CHIPS=$chips chips"

# A word as a string of YAML; Kubernetes would expand $(NAME).
quoted() {
  local word=${1//\\/\\\\}
  word=${word//\"/\\\"}
  word=${word//\$(/\$\$(}
  printf '"%s"' "$word"
}

jobset() {
  cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $IRG_JOB
END
  [[ -z ${IRG_QUEUE:-} ]] || cat <<END
  labels:
    kueue.x-k8s.io/queue-name: $IRG_QUEUE
END
  cat <<END
  annotations:
    # A slice is one node pool: all of its hosts, and nobody else on them.
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: ${IRG_RESTARTS:-20}
    rules:
      - name: preempted # does not count
        action: RestartJobSetAndIgnoreMaxRestarts
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: ${IRG_SLICES:-1}
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          backoffLimit: 0 # one lost host restarts all: they only work together
          podFailurePolicy:
            rules:
              - action: FailJob
                onPodConditions:
                  - type: DisruptionTarget
                    status: "True"
              - action: FailJob
                onExitCodes:
                  operator: In
                  values: [143] # ended by SIGTERM, everything saved
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 300 # SIGTERM saves a checkpoint first
              hostNetwork: true # faster between slices
              dnsPolicy: ClusterFirstWithHostNet
END
  [[ -z ${IRG_ACCOUNT:-} ]] || echo "              serviceAccountName: $IRG_ACCOUNT"
  cat <<END
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $IRG_ACCELERATOR
                cloud.google.com/gke-tpu-topology: $IRG_TOPOLOGY
END
  [[ -z ${IRG_SPOT:-} ]] || cat <<END
                cloud.google.com/gke-spot: "true"
              tolerations:
                - key: cloud.google.com/gke-spot
                  operator: Equal
                  value: "true"
                  effect: NoSchedule
END
  cat <<END
              containers:
                - name: irg
                  image: $IRG_IMAGE
                  command:
END
  for word in "$@"; do
    printf '                    - %s\n' "$(quoted "$word")"
  done
  cat <<END
                  ports:
                    - containerPort: 8471 # between the hosts of a slice
                    - containerPort: 8482 # jax.distributed
                  resources:
                    limits:
                      google.com/tpu: $chips
                  volumeMounts:
                    - name: memory
                      mountPath: /dev/shm
              volumes:
                - name: memory # workers pass batches through it
                  emptyDir:
                    medium: Memory
END
}

if [[ -n $irg_dry_run ]]; then
  jobset "$@"
else
  jobset "$@" | kubectl apply -f -
fi

#!/usr/bin/env bash
# One command on every GPU of a SLURM job, one process each.
#   bash launch/slurm.sh [--dry-run] COMMAND...     such as irg train ... --distributed
# Before the time is over SLURM sends SIGTERM, training saves, and the job queues itself again.
# Variables:
#   IRG_NODES      nodes (default 1)
#   IRG_GPUS       GPUs, hence processes, of a node (default 8)
#   IRG_VENV       environment that holds irg (default .venv, here)
#   IRG_IMAGE      container image instead, on clusters with Pyxis
#   SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT   as the cluster wants; sbatch reads them
#SBATCH --job-name=irg
#SBATCH --cpus-per-task=8
#SBATCH --output=irg-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@300
set -euo pipefail

# In the job. SLURM runs a copy of this file, so nothing beside it can be read.
if [[ ${1:-} == --job ]]; then
  shift
  container=(${IRG_IMAGE:+--container-image="$IRG_IMAGE" --container-workdir=/irg})
  if [[ -z ${IRG_IMAGE:-} ]]; then
    export PATH=${IRG_VENV:-$SLURM_SUBMIT_DIR/.venv}/bin:$PATH
    cd "$SLURM_SUBMIT_DIR"
  fi
  status=0
  srun --kill-on-bad-exit=0 ${container[@]+"${container[@]}"} "$@" || status=$?
  if [[ $status -eq 143 ]]; then # stopped by SIGTERM, everything saved
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$status"
fi

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

irg_options "$@"
set -- ${irg_rest[@]+"${irg_rest[@]}"}
irg_command "$@"
gpus=${IRG_GPUS:-8}
irg_run sbatch --nodes="${IRG_NODES:-1}" --gpus-per-node="$gpus" --ntasks-per-node="$gpus" \
  "${BASH_SOURCE[0]}" --job "$@"

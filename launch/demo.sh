#!/usr/bin/env bash
# Makes the environment if needed and runs the whole loop on one prompt, with the small model
# that comes with the package (irg_jax/mini/checkpoint).
#   bash launch/demo.sh ["PROMPT"] [FLAGS OF irg generate]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

prompt="two red circles left of a blue star"
if [[ $# -gt 0 && $1 != -* ]]; then
  prompt=$1
  shift
fi

irg_install ""
# What was compiled once is read the next time.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$IRG_ROOT/out/compiled}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-0}
"$IRG_VENV/bin/irg" generate "$prompt" --out "$IRG_ROOT/out/demo" "$@"

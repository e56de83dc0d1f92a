#!/usr/bin/env bash
# Makes the environment if needed and runs the whole loop on one prompt, with the model that comes
# with the package.
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
exec "$IRG_VENV/bin/irg" generate "$prompt" --out "$IRG_ROOT/out/demo" "$@"

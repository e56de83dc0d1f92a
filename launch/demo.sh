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

cat >&2 <<END
The small model of the package thinks, draws, looks at its image, and draws again. The first time,
the installation takes one to three minutes and compiling half a minute; later, about six seconds
in all.
END
irg_install ""
"$IRG_VENV/bin/irg" generate "$prompt" --out "$IRG_ROOT/out/demo" "$@"

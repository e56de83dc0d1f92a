#!/usr/bin/env bash
# Makes the environment if needed and runs the whole loop on one prompt.
#   bash launch/demo.sh ["PROMPT"] [FLAGS OF irg generate]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

prompt="a red cube on top of a blue sphere"
if [[ $# -gt 0 && $1 != -* ]]; then
  prompt=$1
  shift
fi

irg_install ""
irg="$IRG_VENV/bin/irg"
checkpoint=$IRG_ROOT/out/demo-checkpoint
out=$IRG_ROOT/out/demo

if [[ ! -d $checkpoint ]]; then
  "$irg" init --config "$IRG_ROOT/configs/tiny.py" --out "$checkpoint"
fi
cat <<'EOF'

NOTE: this checkpoint holds small random weights. It shows that everything runs: its thoughts
are gibberish and its pictures are noise. For real ones, pass a trained checkpoint to
`irg generate --checkpoint`.

EOF
"$irg" generate "$prompt" --checkpoint "$checkpoint" --out "$out" \
  --config "$IRG_ROOT/configs/generate_tiny.py" "$@"

#!/usr/bin/env bash
# Makes the environment if needed and runs the tests.
#   bash launch/test.sh [PYTEST ARGUMENTS]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

echo "installing into $IRG_VENV where needed (one to three minutes), then all tests: about" \
  "eight minutes on two cores; the slowest are listed at the end" >&2
irg_install test
cd "$IRG_ROOT"
# A file of tests stays in one process, where what it compiles is used again.
exec "$IRG_VENV/bin/python" -m pytest -n auto --maxprocesses 8 --dist loadfile \
  --no-loadscope-reorder "$@"

#!/usr/bin/env bash
# Makes the environment if needed and runs the tests.
#   bash launch/test.sh [PYTEST ARGUMENTS]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

irg_install test
cd "$IRG_ROOT"
exec "$IRG_VENV/bin/python" -m pytest "$@"

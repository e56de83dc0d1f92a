# shellcheck shell=bash
# Sourced by the scripts beside it: one virtual environment, made once and kept current.
#   IRG_VENV    where it is (default .venv in the project's root)
#   IRG_PYTHON  which Python makes it (default: the first of 3.11 or newer that is found)

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

IRG_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit
IRG_VENV=${IRG_VENV:-$IRG_ROOT/.venv}

# On a CPU, arrays in huge pages, where the system gives them to those that ask ("madvise" in
# /sys/kernel/mm/transparent_hugepage/enabled): page faults are a large part of a small step.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

# The tests bring libtpu, to compile for TPUs. On a machine without an accelerator, JAX would look
# for a TPU and complain.
[[ -e /dev/accel0 || -e /dev/vfio || -e /dev/nvidiactl || -e /dev/kfd ]] ||
  export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}

# Prints a Python of 3.11 or newer. Tries to run each: a shim may stand for one that is absent.
irg_find_python() {
  local candidate candidates=(python3 {,~/.local/bin/}python3.{11,12,13,14})
  [[ -n ${IRG_PYTHON:-} ]] && candidates=("$IRG_PYTHON")
  for candidate in "${candidates[@]}"; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  irg_fail "no Python of 3.11 or newer (tried: ${candidates[*]});" \
    "install one (uv python install 3.12), or name it with IRG_PYTHON=/path/to/python3"
}

irg_make_venv() {
  local python
  "$IRG_VENV/bin/python" -c 'import pip' 2>/dev/null && return
  python=$(irg_find_python) || exit
  echo "making the environment $IRG_VENV" >&2
  "$python" -m venv "$IRG_VENV" || irg_fail "$python cannot make $IRG_VENV (on Debian and" \
    "Ubuntu, the package python3-venv is needed)"
}

# irg_install [EXTRA]: installs the project, editable. The stamp is written last, so an
# interrupted installation runs again, and one that is current takes no time.
irg_install() {
  local extra=${1:-} stamp wanted
  irg_make_venv
  stamp=$IRG_VENV/irg-installed-${extra:-base}
  wanted="$IRG_ROOT $(cat "$IRG_ROOT/setup.cfg" "$IRG_ROOT/pyproject.toml" | cksum)"
  [[ -f $stamp && $(<"$stamp") == "$wanted" ]] && return
  echo "installing irg_jax${extra:+[$extra]} into $IRG_VENV" >&2
  "$IRG_VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
    --editable "$IRG_ROOT${extra:+[$extra]}" || irg_fail "the installation failed (see above)"
  printf '%s\n' "$wanted" >"$stamp"
}

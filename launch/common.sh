# shellcheck shell=bash
# Sourced by the scripts beside it: options, messages, and checks of what a command needs.

irg_dry_run=

irg_fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# Prints the comment at the top of the script: its usage.
irg_usage() {
  awk 'NR > 1 { if (!/^# /) exit; print substr($0, 3) }' "$0"
}

# irg_options ARGUMENTS: takes --help and --dry-run from the front; the others are in irg_rest.
irg_options() {
  while [[ ${1:-} == -* ]]; do
    case $1 in
      -h | --help)
        irg_usage
        exit
        ;;
      --dry-run) irg_dry_run=1 ;;
      *) irg_fail "$1: no such option; options are --help and --dry-run, and come first" ;;
    esac
    shift
  done
  # shellcheck disable=SC2034  # the scripts read it
  irg_rest=("$@")
}

# irg_need NAME...: ends the script if one of the variables is not set, and names all that are not.
irg_need() {
  local name missing=()
  for name in "$@"; do
    [[ -n ${!name:-} ]] || missing+=("$name")
  done
  ((${#missing[@]} == 0)) ||
    irg_fail "not set: ${missing[*]}; export them (bash $0 --help says what they are)"
}

# irg_match NAME PATTERN EXAMPLE: checks the value of a variable.
irg_match() {
  [[ ${!1} =~ ^($2)$ ]] || irg_fail "$1=${!1}: want such as $3"
}

# irg_command WORDS: checks the command that each host runs.
irg_command() {
  (($#)) || irg_fail "the command is missing, such as irg train ... --distributed (see --help)"
  [[ "$*" != *$'\n'* ]] || irg_fail "the command has a line break in it: $*"
  [[ " $* " != *" irg train "* || " $* " == *" --distributed "* ]] ||
    irg_fail "irg train: add --distributed, or each process trains alone"
}

# irg_kept WORDS: checks that what the command writes outlives the hosts.
irg_kept() {
  local word before=
  for word in "$@"; do
    if [[ $before == --out || $word == --out=* ]]; then
      [[ ${word#--out=} == *://* ]] || irg_fail "--out ${word#--out=}: is lost with the host" \
        "that writes it; give a folder in a bucket, such as gs://BUCKET/runs/irg"
    fi
    before=$word
  done
}

# irg_run COMMAND: runs it; with --dry-run, prints it.
irg_run() {
  if [[ -z $irg_dry_run ]]; then
    "$@"
    return
  fi
  printf '%q ' "$@"
  echo
}

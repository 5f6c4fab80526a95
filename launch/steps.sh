# Sourced by the scripts of this folder.

# need NAME...: stops if a variable is not set.
need() {
  local variable
  for variable in "$@"; do
    [[ -n "${!variable:-}" ]] || { echo "error: $variable is not set; see the head of $0" >&2; exit 2; }
  done
}

# value FLAG ARGUMENT...: what the arguments give as --FLAG=VALUE or --FLAG VALUE; nothing if they do not.
value() {
  local flag=$1 found=
  shift
  while (($#)); do
    case "$1" in
      "--$flag="* | "-$flag="*) found=${1#*=} ;;
      "--$flag" | "-$flag") found=${2:-} ;;
    esac
    shift
  done
  echo "$found"
}

# run COMMAND...: prints a command and runs it; with DRY_RUN=1 prints only.
run() {
  printf '%s\n' "+$(printf ' %q' "$@")" >&2 # in one piece: others may be printing
  [[ "${DRY_RUN:-0}" == 1 ]] || "$@"
}

# Functions for the scripts of this folder.

# require NAME...: exits with 2 unless all variables are set.
require() {
  local variable
  for variable in "$@"; do
    [[ -n "${!variable:-}" ]] || { echo "error: $variable is not set; see the comments at the top of $0" >&2; exit 2; }
  done
}

# flag_value FLAG ARGUMENT...: prints VALUE of --FLAG=VALUE or --FLAG VALUE in the arguments; nothing without it.
flag_value() {
  local flag=$1 value=
  shift
  while (($#)); do
    case "$1" in
      "--$flag="* | "-$flag="*) value=${1#*=} ;;
      "--$flag" | "-$flag") value=${2:-} ;;
    esac
    shift
  done
  echo "$value"
}

# secrets FUNCTION: calls FUNCTION NAME VALUE for each variable of PASS that is set. Values never go on a command line.
secrets() {
  local variable
  for variable in ${PASS:-HF_TOKEN WANDB_API_KEY}; do
    [[ -z "${!variable:-}" ]] || "$1" "$variable" "${!variable}"
  done
}

# quote ARGUMENT...: prints arguments as further elements of a YAML list; every $ twice, as Kubernetes replaces $(NAME).
quote() {
  local argument escape=\\
  for argument in "$@"; do
    argument=${argument//"$escape"/"$escape$escape"}
    argument=${argument//\"/"$escape\""}
    argument=${argument//$'\n'/"${escape}n"}
    printf ', "%s"' "${argument//\$/\$\$}"
  done
}

# run COMMAND...: prints a command and runs it; DRY_RUN=1 only prints it.
run() {
  printf '%s\n' "+$(printf ' %q' "$@")" >&2 # one write, because other processes may print too
  [[ "${DRY_RUN:-0}" == 1 ]] || "$@"
}

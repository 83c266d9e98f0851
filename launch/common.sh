# shellcheck shell=bash disable=SC2034,SC2153 # set here or by the job, used by
# the scripts that source this
#
# What the launch scripts share: the job file, printing or running a command,
# retries. Sourced, never run.

set -euo pipefail

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "launch: error: bash $BASH_VERSION is too old; these scripts need" \
    "4.4 or newer (macOS: brew install bash)." >&2
  exit 2
fi

REPO=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
DRY_RUN=
RETRY_SECONDS=${AUNET_RETRY_SECONDS:-30} # before a command is tried again
POLL_SECONDS=${AUNET_POLL_SECONDS:-30}   # between two looks at a machine

# Every setting a job file may have; docs/scale.md says what they mean.
SETTINGS=(NAME CONFIG WORKDIR FLAGS PYTHON SECRETS_FILE MAX_RETRIES
  START_TIMEOUT GPUS NODES TIME_LIMIT PARTITION ACCOUNT
  PROJECT ZONE HOSTS BUCKET SERVICE_ACCOUNT SPOT
  ACCELERATOR RUNTIME_VERSION
  CLUSTER SLICES IMAGE NAMESPACE SECRET GKE_ACCELERATOR GKE_TOPOLOGY
  CHIPS_PER_HOST XPK_TPU_TYPE)

say() { printf 'launch: %s\n' "$*" >&2; }

# Ends the script for something a user can put right; 2 as the trainer's own.
fail() {
  say "error: $*"
  exit 2
}

# Prints a command so that it can be pasted into a shell, any shell: bash's own
# ${word@Q} writes $'…' where the locale has no such letter.
quoted() {
  local word line='' LC_ALL=C quote="'\\''"
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word="'${word//\'/"$quote"}'"
    line+="$word "
  done
  printf '%s' "${line% }"
}

# Runs a command, or with --dry-run prints it.
perform() {
  if [[ $DRY_RUN ]]; then
    quoted "$@"
    echo
  else
    "$@"
  fi
}

# A sleep that a signal ends at once.
pause() {
  [[ $DRY_RUN ]] && return
  sleep "$1" 9>&- & # without the lock, should this script die meanwhile
  wait $! || true
}

# Prints the comment at the top of a script as its help.
usage() {
  sed -n '/^# /,/^[^#]/{s/^# \{0,1\}//p;}' "$1"
}

# Splits the arguments of a script into DRY_RUN, JOB, EXTRA_FLAGS (what comes
# after --), OPTIONS (other --options) and WORDS (the rest).
parse_arguments() {
  local script=$1
  shift
  JOB='' EXTRA_FLAGS=() OPTIONS=() WORDS=()
  while (($#)); do
    case $1 in
      -h | --help)
        usage "$script"
        exit 0
        ;;
      --dry-run) DRY_RUN=yes ;;
      --job=*) JOB=${1#--job=} ;;
      --)
        shift
        EXTRA_FLAGS=("$@")
        break
        ;;
      -*) OPTIONS+=("$1") ;;
      *) WORDS+=("$1") ;;
    esac
    shift
  done
  [[ $JOB ]] || fail "say which job: --job=FILE, for example" \
    "--job=launch/jobs/quickstart.env (see --help)."
}

# Reads job file $1 and checks that it sets the names that follow.
load_job() {
  local file=$1 name
  shift
  [[ -f $file ]] || fail "--job=$file: no such file."
  while read -r name; do
    [[ " ${SETTINGS[*]} " == *" $name "* ]] ||
      fail "$file: $name is not a setting. Known: ${SETTINGS[*]}."
  done < <(sed -n 's/^[[:space:]]*\([A-Z][A-Z0-9_]*\)=.*/\1/p' "$file")
  JOB=$(cd -- "$(dirname -- "$file")" && pwd -P)/$(basename -- "$file")

  unset "${SETTINGS[@]}" # a job is its file, not what the shell had set
  FLAGS=() MAX_RETRIES=20 START_TIMEOUT=300 SECRETS_FILE='' SPOT=no
  # shellcheck source=/dev/null
  source "$JOB"
  for name in NAME CONFIG WORKDIR "$@"; do
    [[ ${!name:-} ]] || fail "$file: set $name."
  done
  [[ $NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    fail "$file: NAME=$NAME must be 1 to 40 lower-case letters, digits and" \
      "hyphens, start with a letter and not end with a hyphen."
  [[ $SPOT == yes || $SPOT == no ]] ||
    fail "$file: SPOT=$SPOT must be yes or no."
  for name in MAX_RETRIES START_TIMEOUT GPUS NODES HOSTS SLICES CHIPS_PER_HOST
  do
    [[ ${!name-0} =~ ^[0-9]+$ ]] ||
      fail "$file: $name=${!name} must be a number."
  done
  FLAGS+=(${EXTRA_FLAGS[@]+"${EXTRA_FLAGS[@]}"})
  for name in "$NAME" "$CONFIG" "$WORKDIR" ${FLAGS[@]+"${FLAGS[@]}"}; do
    # Anything on a command line shows in process lists and logs.
    shopt -s nocasematch
    [[ $name =~ (api_?key|_token|password|secret)= ]] &&
      fail "'${name%%=*}' looks like a secret on a command line; put it in" \
        "SECRETS_FILE (see docs/scale.md)."
    shopt -u nocasematch
  done
  cd -- "$REPO" # relative paths of a job start at the repository
  if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ -x .venv/bin/python ]] && PYTHON=$REPO/.venv/bin/python
  fi
  TRAIN_FLAGS=("--config=$CONFIG" "--workdir=$WORKDIR"
    ${FLAGS[@]+"${FLAGS[@]}"})
}

# Puts the KEY=VALUE lines of file $1 into the environment, where command
# lines and logs do not show them.
load_secrets() {
  local file=$1 line
  [[ $file ]] || return 0
  [[ -f $file ]] || fail "SECRETS_FILE=$file: no such file."
  # shellcheck disable=SC2012 # stat differs between Linux and macOS
  [[ $(ls -ldL -- "$file") =~ ^-r.------- ]] ||
    fail "SECRETS_FILE=$file can be read by others: chmod 600 $(quoted "$file")"
  while IFS= read -r line || [[ $line ]]; do
    [[ $line =~ ^[[:space:]]*(#|$) ]] && continue
    [[ $line =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] ||
      fail "SECRETS_FILE=$file: every line must be KEY=VALUE."
    export "${line%%=*}=${line#*=}"
  done <"$file"
}

STOP_REQUESTED=

# Runs a command and returns its status. A Ctrl-C or SIGTERM reaches it as one
# SIGINT (its own process group keeps the terminal's Ctrl-C away): the trainer
# then saves and ends, and leaves at once when the same signal comes again. Not
# as SIGTERM: a machine that shuts down sends that to the trainer itself too.
forward_signals() {
  local child status=0
  set -m
  "$@" </dev/null &
  child=$!
  set +m
  trap 'STOP_REQUESTED=yes; kill -INT "$child" 2>/dev/null || true' INT TERM
  wait "$child" || status=$?
  while kill -0 "$child" 2>/dev/null; do # a signal ended the wait, not it
    status=0
    wait "$child" || status=$?
  done
  trap - INT TERM
  return "$status"
}

# until_finished FINAL COMMAND...: runs a command until its status is one of
# the words of FINAL or a stop was asked for, at most MAX_RETRIES times more.
until_finished() {
  local final=$1 tries=0 status
  shift
  while :; do
    status=0
    "$@" || status=$?
    [[ " $final " == *" $status "* || $STOP_REQUESTED ]] && return "$status"
    if ((tries == MAX_RETRIES)); then
      say "exit status $status; MAX_RETRIES=$MAX_RETRIES used up, giving up."
      return "$status"
    fi
    tries=$((tries + 1))
    say "exit status $status; retry $tries of $MAX_RETRIES from the newest" \
      "checkpoint in $RETRY_SECONDS s."
    pause "$RETRY_SECONDS"
  done
}

# Keeps a second launcher away from a workdir. The lock lives as long as this
# script or anything it started, however they end.
lock_workdir() {
  [[ $DRY_RUN ]] && return
  mkdir -p -- "$WORKDIR"
  exec 9>"$WORKDIR/.launch.lock"
  if command -v flock >/dev/null && ! flock -n 9; then
    fail "another launcher works in $WORKDIR; stop it, or use another WORKDIR."
  fi
}

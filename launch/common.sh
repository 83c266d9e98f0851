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

# Every setting a job file may have; launch/README.md says what they mean.
SETTINGS=(NAME CONFIG WORKDIR FLAGS ENV PYTHON SECRETS_FILE MAX_RETRIES
  MAX_PREEMPTIONS HANG_SECONDS START_TIMEOUT
  GPUS NODES TIME_LIMIT PARTITION ACCOUNT
  PROJECT ZONE HOSTS SLICES BUCKET SERVICE_ACCOUNT SPOT
  ACCELERATOR RUNTIME_VERSION RESERVED RESERVATION_PROJECT NETWORK SUBNETWORK
  INTERNAL_IPS IAP DATA_DISK VALID_UNTIL
  CLUSTER IMAGE NAMESPACE SECRET GKE_ACCELERATOR GKE_TOPOLOGY
  CHIPS_PER_HOST KUBERNETES_ACCOUNT RESERVATION QUEUE XPK_TPU_TYPE XPK_STORAGE)

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
  # Without the lock, should this script die meanwhile.
  sleep "$1" >/dev/null 2>&1 9>&- &
  wait $! || true
}

# Prints the comment at the top of a script as its help.
usage() {
  sed -n '1,/^[^#]/{/^#!/d;/^#SBATCH/d;s/^# \{0,1\}//p;}' "$1"
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
  done < <(sed -n 's/^[[:space:]]*\([A-Z][A-Z0-9_]*\)+\{0,1\}=.*/\1/p' "$file")
  JOB=$(cd -- "$(dirname -- "$file")" && pwd -P)/$(basename -- "$file")

  unset "${SETTINGS[@]}" # a job is its file, not what the shell had set
  FLAGS=() ENV=() MAX_RETRIES=5 MAX_PREEMPTIONS=1000 HANG_SECONDS=3600
  START_TIMEOUT=300 SECRETS_FILE='' SPOT=no RESERVED=no INTERNAL_IPS=no IAP=no
  # shellcheck source=/dev/null
  source "$JOB"
  for name in NAME CONFIG WORKDIR "$@"; do
    [[ ${!name:-} ]] || fail "$file: set $name."
  done
  [[ $WORKDIR == gs://*/* || $WORKDIR != *://* ]] ||
    fail "$file: WORKDIR=$WORKDIR is a URL, and a run can keep nothing there:" \
      "name a directory, or gs://BUCKET/PATH."
  [[ $NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    fail "$file: NAME=$NAME must be 1 to 40 lower-case letters, digits and" \
      "hyphens, start with a letter and not end with a hyphen."
  for name in SPOT RESERVED INTERNAL_IPS IAP; do
    [[ ${!name} == yes || ${!name} == no ]] ||
      fail "$file: $name=${!name} must be yes or no."
  done
  for name in MAX_RETRIES MAX_PREEMPTIONS HANG_SECONDS START_TIMEOUT GPUS \
    NODES HOSTS SLICES CHIPS_PER_HOST; do
    [[ ${!name-0} =~ ^[0-9]+$ ]] ||
      fail "$file: $name=${!name} must be a number."
  done
  FLAGS+=(${EXTRA_FLAGS[@]+"${EXTRA_FLAGS[@]}"})
  for name in ${ENV[@]+"${ENV[@]}"}; do
    [[ $name =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] ||
      fail "$file: ENV has '$name'; every entry must be KEY=VALUE."
  done
  for name in "$NAME" "$CONFIG" "$WORKDIR" ${FLAGS[@]+"${FLAGS[@]}"} \
    ${ENV[@]+"${ENV[@]}"}; do
    # Anything on a command line shows in process lists and logs.
    shopt -s nocasematch
    [[ $name =~ (api_?key|_token|password|secret)= ]] &&
      fail "'${name%%=*}' looks like a secret on a command line; put it in" \
        "SECRETS_FILE (see launch/README.md)."
    shopt -u nocasematch
  done
  cd -- "$REPO" # relative paths of a job start at the repository
  if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ -x .venv/bin/python ]] && PYTHON=$REPO/.venv/bin/python
  fi
  TRAIN_FLAGS=("--config=$CONFIG" "--workdir=$WORKDIR"
    ${FLAGS[@]+"${FLAGS[@]}"})
  # What the scripts themselves keep: their lock, SLURM's log.
  LOCAL_DIR=$WORKDIR
  [[ $WORKDIR != gs://* ]] ||
    LOCAL_DIR=${XDG_STATE_HOME:-$HOME/.local/state}/aunet_jax/$NAME
  # Compiled programs are kept where a replaced machine finds them. JAX writes
  # from process 0 only (jax 0.10.2, _src/compiler.py:_cache_write).
  RUN_ENV=("JAX_COMPILATION_CACHE_DIR=$WORKDIR/compiled"
    ${ENV[@]+"${ENV[@]}"})
}

# Takes option --NAME=VALUE of a script for setting NAME of the job: the one
# flag that resumes a run on less (or more) hardware.
resize() {
  local name=$1 value=$2
  [[ $value =~ ^[1-9][0-9]*$ ]] || fail "$name=$value must be a number from 1."
  printf -v "$name" %s "$value"
}

# check_job JOB_DEVICES DEVICES SLICES [REQUIREMENTS]: looks at what the run
# needs before anything is asked for: the config and its flags, packages that
# its data need (in a lock file, or in this Python), a mesh that fits DEVICES.
# Where they are not the devices the job was written for, adds the flags of a
# mesh that still divides the batch.
check_job() {
  local found line
  found=$("$PYTHON" "$REPO/launch/check_job.py" "--job_devices=$1" \
    "--devices=$2" "--slices=$3" "--bucket=${BUCKET:-}" \
    "--requirements=${4:-}" -- "${TRAIN_FLAGS[@]}") || exit
  while IFS= read -r line; do
    if [[ $line ]]; then TRAIN_FLAGS+=("$line"); fi
  done <<<"$found"
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

# What the package knows of a WORKDIR in a bucket: "step N checkpoint N", or
# nothing where the bucket does not answer.
bucket_progress() {
  JAX_PLATFORMS=cpu timeout 60 "$PYTHON" -m aunet_jax.progress \
    "--workdir=$WORKDIR" 2>/dev/null | grep '^step ' || true
}

# The step of the newest logged row, or nothing.
newest_step() {
  if [[ $WORKDIR == gs://* ]]; then
    bucket_progress | sed -n 's/^step \([1-9][0-9]*\) .*/\1/p'
    return
  fi
  [[ -f $WORKDIR/metrics.jsonl ]] || return 0
  tail -n 20 -- "$WORKDIR/metrics.jsonl" 2>/dev/null |
    sed -n 's/^{.*"step": *\([0-9]\{1,\}\).*/\1/p' | tail -n 1
}

# The step of the newest checkpoint, or nothing.
newest_checkpoint() {
  local path newest=
  if [[ $WORKDIR == gs://* ]]; then
    bucket_progress | sed -n 's/.* checkpoint \([1-9][0-9]*\)$/\1/p'
    return
  fi
  for path in "$WORKDIR"/checkpoints/*/; do
    path=${path%/} path=${path##*/}
    [[ $path =~ ^[0-9]+$ ]] && ((10#$path >= ${newest:-0})) &&
      newest=$((10#$path))
  done
  echo "$newest"
}

# Budgets of a run: stops that are nobody's fault (many) and failures (few).
# A checkpoint that was not there before gives both back in full: a run that
# comes forward may be stopped as often as it likes.
FAILURES=0 PREEMPTIONS=0 BEST_CHECKPOINT=

# may_go_on KIND CHECKPOINT: counts a stop (preemption or failure) of a run
# whose newest checkpoint is CHECKPOINT; false when that was one too many.
may_go_on() {
  if ((${2:-0} > ${BEST_CHECKPOINT:-0})); then
    FAILURES=0 PREEMPTIONS=0 BEST_CHECKPOINT=$2
  fi
  if [[ $1 == preemption ]]; then
    PREEMPTIONS=$((PREEMPTIONS + 1))
    COUNTED="preemption $PREEMPTIONS of $MAX_PREEMPTIONS"
    ((PREEMPTIONS <= MAX_PREEMPTIONS)) && return
    say "MAX_PREEMPTIONS=$MAX_PREEMPTIONS used up without a new checkpoint," \
      "giving up."
  else
    FAILURES=$((FAILURES + 1))
    COUNTED="retry $FAILURES of $MAX_RETRIES"
    ((FAILURES <= MAX_RETRIES)) && return
    say "MAX_RETRIES=$MAX_RETRIES used up without a new checkpoint, giving up."
  fi
  return 1
}

# watch_steps COMMAND...: runs COMMAND, which ends the run, once no new step
# was logged for HANG_SECONDS. The trainer's own watchdog is quicker; this one
# also sees a process that is frozen.
watch_steps() {
  local seen=- now since=$SECONDS
  ((HANG_SECONDS > 0)) || return 0
  while :; do
    pause "$POLL_SECONDS"
    kill -0 $$ 2>/dev/null || return 0 # the launcher was killed
    now=$(newest_step)
    if [[ $now != "$seen" ]]; then
      seen=$now since=$SECONDS
    elif ((SECONDS - since >= HANG_SECONDS)); then
      say "no new step for $HANG_SECONDS s (the last one: ${seen:-none});" \
        "ending the trainer."
      "$@"
      return
    fi
  done
}

# Ends a process group that hangs: SIGABRT, at which Python shows its stacks,
# then what even a frozen process obeys.
end_hung() {
  kill -ABRT -- "-$1" 2>/dev/null || true
  sleep "${AUNET_ABORT_SECONDS:-10}" >/dev/null 2>&1
  kill -KILL -- "-$1" 2>/dev/null || true
}

STOP_REQUESTED=
FORWARD_AS=INT # the signal that tells the trainer to save and end

# Runs a command and returns its status. A Ctrl-C or SIGTERM reaches it as one
# FORWARD_AS (its own process group keeps the terminal's Ctrl-C away): the
# trainer then saves and ends, and leaves at once when the same signal comes
# again. Not as SIGTERM on a host of its own: a machine that shuts down sends
# that to the trainer itself too.
forward_signals() {
  local child watcher status=0
  set -m
  "$@" </dev/null &
  child=$!
  set +m
  watch_steps end_hung "$child" 9>&- &
  watcher=$!
  trap 'STOP_REQUESTED=yes
    kill "-$FORWARD_AS" "$child" 2>/dev/null || true' INT TERM
  wait "$child" || status=$?
  while kill -0 "$child" 2>/dev/null; do # a signal ended the wait, not it
    status=0
    wait "$child" || status=$?
  done
  trap - INT TERM
  kill "$watcher" 2>/dev/null || true
  wait "$watcher" 2>/dev/null || true
  return "$status"
}

# until_finished FINAL COMMAND...: runs a command until its status is one of
# the words of FINAL, a stop was asked for, or a budget is used up. Bad input
# (2) is final only for a start that made no step: input that trained was good.
until_finished() {
  local final=$1 status kind before
  shift
  BEST_CHECKPOINT=$(newest_checkpoint)
  while :; do
    status=0 before=$(newest_step)
    "$@" || status=$?
    [[ $STOP_REQUESTED ]] && return "$status"
    if [[ " $final " == *" $status "* ]]; then
      [[ $status == 2 && $(newest_step) != "$before" ]] || return "$status"
      say "exit status 2 after steps that worked: taken for a failure."
    fi
    kind=failure
    ((status == 75)) && kind=preemption
    may_go_on "$kind" "$(newest_checkpoint)" || return "$status"
    say "exit status $status; $COUNTED from the newest checkpoint in" \
      "$RETRY_SECONDS s."
    pause "$RETRY_SECONDS"
  done
}

# Keeps a second launcher away from a workdir. The lock lives as long as this
# script or anything it started, however they end.
lock_workdir() {
  [[ $DRY_RUN ]] && return
  mkdir -p -- "$LOCAL_DIR"
  exec 9>"$LOCAL_DIR/.launch.lock"
  if command -v flock >/dev/null && ! flock -n 9; then
    fail "another launcher works in $WORKDIR; stop it, or use another WORKDIR."
  fi
}

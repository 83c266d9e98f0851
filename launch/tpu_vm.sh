#!/usr/bin/env bash
# Trains on a slice of Cloud TPU VMs (v4, v5e, v5p, v6e), through queued
# resources.
#
#   launch/tpu_vm.sh COMMAND --job=FILE [--dry-run] [-- TRAINER FLAGS]
#
#   create   ask for the slice and wait until it is there; stock-outs and
#            preempted requests are asked for again. Ctrl-C takes it back.
#   setup    copy the committed code to all workers and install it
#   run      create, setup, start, and watch until the training has finished:
#            a worker that dies, or no step for HANG_SECONDS, starts all again
#            from the newest checkpoint, a preempted slice is replaced. Ctrl-C saves and stops. A slice that
#            `run` made is deleted when it ends, however it ends; one made
#            with `create` before is kept. --keep keeps either.
#   status   the slice, and the trainer on every worker
#   logs     the last lines of all workers; --follow: and what follows
#   stop     save and stop a trainer that no `run` watches (a `run` would start
#            it again: end that with Ctrl-C); the slice stays, and costs
#   delete   delete the slice and wait until it is gone
#
#   --job=FILE   PROJECT, ZONE, ACCELERATOR, RUNTIME_VERSION, SLICES, SPOT,
#                BUCKET, CONFIG, WORKDIR, … (launch/README.md lists them)
#   --slices=N   go on with N slices of the job's, or
#   --slice=TYPE with slices of another ACCELERATOR (v5litepod-32), on a mesh
#                that still divides the batch
#   --dry-run    print every command, run nothing
#
# Needs gcloud, logged in, and `ssh-add ~/.ssh/google_compute_engine` (gcloud
# asks for it when a command goes to several workers).
# Exit status: 0 finished, 2 bad input, 75 stopped with everything saved,
# 130 interrupted, 1 a budget used up (MAX_RETRIES failures, MAX_PREEMPTIONS
# lost slices or stops, both counted from the last new checkpoint).
# AUNET_POLL_SECONDS (30): between two looks. AUNET_RETRY_SECONDS (30): before
# a new try. AUNET_GRACE_SECONDS (300): for saving, before SIGKILL.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

MAX_UNREACHABLE=5 # looks in a row that miss a worker before it counts as lost
grace=${AUNET_GRACE_SECONDS:-300}

# ----- the slice ------------------------------------------------------------

STATE=''          # of the slice, as slice_state saw it last; ABSENT = none
PRETEND=ABSENT    # what --dry-run answers
MADE_HERE=        # this script asked for the slice
TEMPORARY=        # file for what gcloud prints

slice_state() {
  local describe=(gcloud compute tpus queued-resources describe "$NAME"
    "${where[@]}" '--format=value(state.state)')
  if [[ $DRY_RUN ]]; then
    perform "${describe[@]}"
    STATE=$PRETEND
  elif "${describe[@]}" >"$TEMPORARY" 2>"$TEMPORARY.error"; then
    STATE=$(<"$TEMPORARY")
  elif grep -qi 'NOT_FOUND\|not found' "$TEMPORARY.error"; then
    STATE=ABSENT
  else
    STATE=UNKNOWN
    cat "$TEMPORARY.error" >&2
  fi
}

request_slice() {
  # Flags of Google Cloud SDK 528, surface/compute/tpus/queued_resources/
  # create.yaml: one node is named, several are counted (from 2).
  local node=(--node-id="$NAME")
  ((SLICES > 1)) && node=(--node-count="$SLICES" --node-prefix="$NAME")
  local request=(gcloud compute tpus queued-resources create "$NAME"
    "${node[@]}" "${where[@]}" --accelerator-type="$ACCELERATOR"
    --runtime-version="$RUNTIME_VERSION")
  [[ $SPOT == yes ]] && request+=(--spot)
  [[ $RESERVED == yes ]] && request+=(--reserved)
  [[ ${RESERVATION_PROJECT:-} ]] &&
    request+=(--reservation-host-project="$RESERVATION_PROJECT")
  [[ ${NETWORK:-} ]] && request+=(--network="$NETWORK")
  [[ ${SUBNETWORK:-} ]] && request+=(--subnetwork="$SUBNETWORK")
  [[ $INTERNAL_IPS == yes ]] && request+=(--internal-ips)
  [[ ${DATA_DISK:-} ]] &&
    request+=("--data-disk=source=$DATA_DISK,mode=read-only")
  [[ ${VALID_UNTIL:-} ]] && request+=(--valid-until-duration="$VALID_UNTIL")
  [[ ${SERVICE_ACCOUNT:-} ]] && request+=(--service-account="$SERVICE_ACCOUNT")
  local made=$MADE_HERE
  MADE_HERE=yes # before asking: an interrupted request may have arrived
  PRETEND=ACTIVE
  if [[ $DRY_RUN ]]; then
    perform "${request[@]}"
    return
  fi
  "${request[@]}" 2>"$TEMPORARY.error" && return
  cat "$TEMPORARY.error" >&2
  if grep -qi 'already exists\|ALREADY_EXISTS' "$TEMPORARY.error"; then
    MADE_HERE=$made # by someone else, or by an earlier try of ours
    return
  elif grep -qi 'quota' "$TEMPORARY.error"; then
    MADE_HERE=
    fail "the quota of $PROJECT does not allow this slice; ask for more, or" \
      "change ACCELERATOR, ZONE or SPOT."
  elif grep -qi 'RESOURCE_EXHAUSTED\|capacity\|stock\|UNAVAILABLE\|DEADLINE' \
    "$TEMPORARY.error"; then
    return 1
  fi
  MADE_HERE=
  fail "gcloud refused the request; see above."
}

# Returns once the slice is there; counts what fails against MAX_PREEMPTIONS,
# since a stock-out is nobody's fault either.
create_slice() {
  local tries=0 unknown=0
  while :; do
    slice_state
    [[ $STATE == UNKNOWN ]] || unknown=0
    case $STATE in
      ACTIVE) return 0 ;;
      UNKNOWN)
        unknown=$((unknown + 1))
        ((unknown < MAX_UNREACHABLE)) || {
          say "gcloud gave no state of $NAME $unknown times in a row."
          return 1
        }
        ;;
      ABSENT | FAILED | SUSPENDING | SUSPENDED)
        if ((tries > MAX_PREEMPTIONS)); then
          say "no slice after $MAX_PREEMPTIONS retries, giving up."
          return 1
        fi
        if ((tries > 0)); then
          say "no slice ($STATE); retry $tries of $MAX_PREEMPTIONS in" \
            "$RETRY_SECONDS s."
          pause "$RETRY_SECONDS"
        fi
        tries=$((tries + 1))
        [[ $STATE == ABSENT ]] || delete_slice
        request_slice || continue
        ;;
      *) say "$NAME: $STATE" ;;
    esac
    pause "$POLL_SECONDS"
  done
}

delete_slice() {
  local tries delete=(gcloud compute tpus queued-resources delete "$NAME"
    "${where[@]}" --force --quiet)
  PRETEND=ABSENT
  for ((tries = 0; tries < MAX_UNREACHABLE; tries++)); do
    perform "${delete[@]}" || true # gone already is fine: the state decides
    slice_state
    [[ $STATE == ABSENT ]] && return 0 # in a trap, bare: what failed before
    pause "$POLL_SECONDS"
  done
  say "$NAME is still $STATE AND MAY COST MONEY. Delete it by hand:"
  say "  $(quoted "${delete[@]}")"
  return 1
}

# ----- its workers ----------------------------------------------------------

# Runs a line of shell on every worker of every slice at once. gcloud itself
# tries a worker that does not answer ten times. Of the commands that reach TPU
# VMs only queued-resources ssh and scp know all nodes of a request and, outside
# alpha, IAP (Google Cloud SDK 528, surface/compute/tpus/*/ssh.py); by default
# they take 64 workers at a time, one batch after the other.
shell_on_workers() {
  perform gcloud compute tpus queued-resources ssh "$NAME" "${where[@]}" \
    "${reach[@]}" --ssh-flag=-oConnectTimeout=10 "--command=$1"
}

# Runs tpu_worker.sh with some arguments on every worker at once.
on_workers() {
  shell_on_workers "bash aunet/code/launch/tpu_worker.sh $(quoted "$@")"
}

copy_to_workers() {
  perform gcloud compute tpus queued-resources scp "$1" "$NAME:$2" \
    "${where[@]}" "${reach[@]}" --scp-flag=-p
}

setup_workers() {
  local archive=$scratch/aunet_code.tar.gz unpack
  [[ $DRY_RUN ]] && archive=/tmp/aunet_code.tar.gz
  if [[ ! $DRY_RUN ]] &&
    [[ $(git -C "$REPO" status --porcelain --untracked-files=no) ]]; then
    say "warning: workers get the last commit, without your later changes."
  fi
  perform git -C "$REPO" archive --format=tar.gz "--output=$archive" HEAD ||
    return
  copy_to_workers "$archive" aunet_code.tar.gz || return
  unpack='mkdir -p aunet && rm -rf aunet/code && mkdir aunet/code'
  unpack+=' && tar -xzf aunet_code.tar.gz -C aunet/code'
  shell_on_workers "$unpack" || return
  if [[ $SECRETS_FILE ]]; then
    copy_to_workers "$SECRETS_FILE" aunet/secrets.env || return # stays 0600
  fi
  on_workers setup "${BUCKET:-}" "${DATA_DISK:+disk}"
}

start_workers() {
  on_workers start "$WORKDIR" "${RUN_ENV[@]}" -- "${TRAIN_FLAGS[@]}" \
    --multihost --num_processes="$WORKERS" --start_timeout="$START_TIMEOUT"
}

stop_workers() { on_workers stop "${1:-$grace}"; }

# Brings the trainer up on all workers, or finds it running there.
launch_workers() {
  if [[ ! $DRY_RUN ]]; then
    on_workers poll >"$TEMPORARY" 2>/dev/null || true
    (($(count running) == WORKERS)) && return
  fi
  setup_workers && start_workers
}

# How many workers are in a state, of those that the last look reached.
count() {
  grep -c "^worker [^ ]* $1 step [0-9]* checkpoint [0-9]*\$" "$TEMPORARY" || true
}

# The largest step (or checkpoint) that a worker told at the last look.
newest() {
  sed -n "s/^worker .* $1 \([0-9]\{1,\}\).*/\1/p" "$TEMPORARY" | sort -n | tail -n 1
}

# Looks until the run has an outcome: finished, bad_input, failed, stopped,
# hung, lost.
watch_workers() {
  local unreachable=0 step seen=- since=$SECONDS refused=
  while :; do
    pause "$POLL_SECONDS"
    if [[ $DRY_RUN ]]; then
      on_workers poll
      OUTCOME=finished
      return
    fi
    on_workers poll >"$TEMPORARY" || true # who did not answer is counted below
    local running done_ answered other
    running=$(count running) done_=$(count 'exit 0') answered=$(count '.*')
    step=$(newest step)
    CHECKPOINT=$(newest checkpoint)
    other=$((answered - running - done_ - $(count 'exit 2')))
    say "$running of $WORKERS workers train (step ${step:-0}), $done_ have" \
      "finished, $((WORKERS - answered)) did not answer"
    if (($(count 'exit 2') > 0 && other == 0)); then
      # A process that met a passing fault ends the others, each in its way:
      # it is bad input only where no other status comes with it.
      if [[ $refused ]]; then
        OUTCOME=bad_input
        return
      fi
      refused=yes
      continue
    elif ((done_ == WORKERS)); then
      OUTCOME=finished
      return
    elif ((running + done_ < answered)); then
      OUTCOME=failed
      if (($(count 'exit 75') == other && other > 0)); then OUTCOME=stopped; fi
      return
    elif ((answered < WORKERS)); then
      slice_state
      case $STATE in
        ACTIVE) unreachable=$((unreachable + 1)) ;;
        UNKNOWN) say "gcloud does not answer either; the run goes on there." ;;
        *) unreachable=$MAX_UNREACHABLE ;; # preempted
      esac
      if ((unreachable == MAX_UNREACHABLE)); then
        OUTCOME=lost
        return
      fi
    else
      unreachable=0
    fi
    if [[ $step != "$seen" || $answered == 0 ]]; then
      seen=$step since=$SECONDS
    elif ((HANG_SECONDS > 0 && SECONDS - since >= HANG_SECONDS)); then
      say "no new step for $HANG_SECONDS s (the last one: ${step:-none})."
      OUTCOME=hung
      return
    fi
  done
}

run() {
  local kind
  trap interrupted INT TERM
  create_slice || return
  [[ $MADE_HERE ]] || KEEP=yes # it was there before
  OUTCOME=lost
  if launch_workers; then watch_workers; fi
  while [[ $OUTCOME == failed || $OUTCOME == stopped || $OUTCOME == hung ||
    $OUTCOME == lost ]]; do
    kind=failure
    [[ $OUTCOME == lost || $OUTCOME == stopped ]] && kind=preemption
    may_go_on "$kind" "$CHECKPOINT" || return 1
    say "workers $OUTCOME; $COUNTED from the newest checkpoint in" \
      "$RETRY_SECONDS s."
    pause "$RETRY_SECONDS"
    slice_state
    if [[ $OUTCOME != lost && $STATE =~ ^(ACTIVE|UNKNOWN)$ ]]; then
      # One trainer ended; the others wait for it in vain.
      OUTCOME=lost
      if stop_workers 30 && start_workers; then watch_workers; fi
    else
      [[ $STATE == ABSENT ]] || delete_slice || return
      create_slice || return
      OUTCOME=lost
      if launch_workers; then watch_workers; fi
    fi
  done
  if [[ $OUTCOME == bad_input ]]; then
    on_workers logs 5 || true
    say "the trainer refused its input (exit status 2); no retry helps."
    stop_workers || true
    return 2
  fi
}

interrupted() {
  trap '' INT TERM
  say "interrupted: saving and stopping; this takes up to $grace s."
  local status=130
  if [[ $COMMAND == run ]] && stop_workers >"$TEMPORARY"; then
    (($(count 'exit 75') == WORKERS)) && status=75
  fi
  exit "$status"
}

cleanup() {
  local status=$?
  trap '' INT TERM
  if [[ $DRY_RUN || $TEARDOWN ]] && [[ $MADE_HERE && ! $KEEP ]]; then
    delete_slice || status=1
  fi
  rm -rf "$scratch"
  exit "$status"
}

# ----- commands -------------------------------------------------------------

parse_arguments "$0" "$@"
KEEP='' FOLLOW='' TEARDOWN='' CHECKPOINT='' slices='' slice=''
for option in ${OPTIONS[@]+"${OPTIONS[@]}"}; do
  case $option in
    --keep) KEEP=yes ;;
    --follow) FOLLOW=yes ;;
    --slices=*) slices=${option#--slices=} ;;
    --slice=*) slice=${option#--slice=} ;;
    *) fail "unknown option $option; see --help." ;;
  esac
done
COMMAND=${WORDS[0]:-}
((${#WORDS[@]} == 1)) ||
  fail "give one of create, setup, run, status, logs, stop, delete."
load_job "$JOB" PROJECT ZONE ACCELERATOR RUNTIME_VERSION
SLICES=${SLICES:-1}

# Chips and VMs of an accelerator type: names of v4 and v5p count cores, two a
# chip; a VM has 4 chips, or all of a v5e or v6e slice of up to 8.
CHIPS='' VMS=''
size_of() {
  [[ $1 =~ ^(v4|v5p|v5litepod|v6e)-([1-9][0-9]*)$ ]] ||
    fail "ACCELERATOR=$1: $0 knows v4-N, v5p-N, v5litepod-N and v6e-N" \
      "(TPU7x is not in the Cloud TPU API: launch/gke.sh)."
  CHIPS=${BASH_REMATCH[2]}
  [[ ${BASH_REMATCH[1]} == v4 || ${BASH_REMATCH[1]} == v5p ]] &&
    CHIPS=$((CHIPS / 2))
  VMS=$(((CHIPS + 3) / 4))
  [[ ${BASH_REMATCH[1]} =~ ^(v5litepod|v6e)$ ]] && ((CHIPS <= 8)) && VMS=1
  return 0
}

size_of "$ACCELERATOR"
[[ ${HOSTS:-$VMS} == "$VMS" ]] ||
  fail "$JOB: HOSTS=$HOSTS but ACCELERATOR=$ACCELERATOR has $VMS VMs; leave" \
    "HOSTS out."
job_devices=$((CHIPS * SLICES))
[[ $slice ]] && ACCELERATOR=$slice && size_of "$slice"
[[ $slices ]] && resize SLICES "$slices"
WORKERS=$((VMS * SLICES))
where=(--project="$PROJECT" --zone="$ZONE")
reach=(--node=all --worker=all --batch-size=all)
if [[ $IAP == yes ]]; then
  reach+=(--tunnel-through-iap)
elif [[ $INTERNAL_IPS == yes ]]; then
  reach+=(--internal-ip)
fi
[[ $DRY_RUN || -f $CONFIG ]] || fail "CONFIG=$CONFIG: no such file in $REPO."
(load_secrets "$SECRETS_FILE") || exit # only to check it before anything costs
if [[ $COMMAND == create || $COMMAND == run ]]; then
  [[ $WORKDIR == /* || $WORKDIR == gs://* ]] ||
    fail "WORKDIR=$WORKDIR would be lost with the slice: name gs://BUCKET/PATH," \
      "or a directory that all workers see, below /mnt/bucket (with BUCKET)."
  check_job "$job_devices" "$((CHIPS * SLICES))" "$SLICES" \
    "$REPO/launch/requirements-tpu.txt"
fi
if [[ ! $DRY_RUN ]]; then
  command -v gcloud >/dev/null || fail "gcloud is not on PATH."
fi
scratch=$(mktemp -d)
TEMPORARY=$scratch/gcloud
trap cleanup EXIT

case $COMMAND in
  create)
    TEARDOWN=yes # until the slice is there
    trap interrupted INT TERM
    create_slice
    TEARDOWN='' MADE_HERE=''
    ;;
  setup) setup_workers ;;
  run)
    TEARDOWN=yes
    run
    ;;
  status)
    slice_state
    [[ $DRY_RUN ]] || echo "$NAME: $STATE"
    if [[ $DRY_RUN || $STATE == ACTIVE ]]; then on_workers poll; fi
    ;;
  logs) on_workers logs 20 ${FOLLOW:+-f} ;;
  stop) stop_workers ;;
  delete) delete_slice ;;
  *) fail "$COMMAND is not one of create, setup, run, status, logs, stop," \
    "delete." ;;
esac

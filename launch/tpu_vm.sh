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
#            a worker that dies starts all again from the newest checkpoint, a
#            preempted slice is replaced. Ctrl-C saves and stops. A slice that
#            `run` made is deleted when it ends, however it ends; one made
#            with `create` before is kept. --keep keeps either.
#   status   the slice, and the trainer on every worker
#   logs     the last lines of all workers; --follow: and what follows
#   stop     save and stop a trainer that no `run` watches (a `run` would start
#            it again: end that with Ctrl-C); the slice stays, and costs
#   delete   delete the slice and wait until it is gone
#
#   --job=FILE   PROJECT, ZONE, ACCELERATOR, RUNTIME_VERSION, HOSTS, SPOT,
#                BUCKET, CONFIG, WORKDIR, … (docs/scale.md lists them)
#   --dry-run    print every command, run nothing
#
# Needs gcloud, logged in, and `ssh-add ~/.ssh/google_compute_engine` (gcloud
# asks for it when a command goes to several workers).
# Exit status: 0 finished, 2 bad input, 75 stopped with everything saved,
# 130 interrupted, 1 retries used up.
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
  local request=(gcloud compute tpus queued-resources create "$NAME"
    --node-id="$NAME" "${where[@]}" --accelerator-type="$ACCELERATOR"
    --runtime-version="$RUNTIME_VERSION")
  [[ $SPOT == yes ]] && request+=(--spot)
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

# Returns once the slice is there; counts what fails against MAX_RETRIES.
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
        if ((tries > MAX_RETRIES)); then
          say "no slice after $MAX_RETRIES retries, giving up."
          return 1
        fi
        if ((tries > 0)); then
          say "no slice ($STATE); retry $tries of $MAX_RETRIES in" \
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

# Runs a line of shell on every worker at once. gcloud itself tries a worker
# that does not answer ten times.
shell_on_workers() {
  perform gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all \
    --ssh-flag=-oConnectTimeout=10 "--command=$1"
}

# Runs tpu_worker.sh with some arguments on every worker at once.
on_workers() {
  shell_on_workers "bash aunet/code/launch/tpu_worker.sh $(quoted "$@")"
}

copy_to_workers() {
  perform gcloud compute tpus tpu-vm scp "$1" "$NAME:$2" "${where[@]}" \
    --worker=all --scp-flag=-p
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
  on_workers setup "${BUCKET:-}"
}

start_workers() {
  on_workers start "${TRAIN_FLAGS[@]}" --multihost --num_processes="$HOSTS" \
    --start_timeout="$START_TIMEOUT"
}

stop_workers() { on_workers stop "${1:-$grace}"; }

# Brings the trainer up on all workers, or finds it running there.
launch_workers() {
  if [[ ! $DRY_RUN ]]; then
    on_workers poll >"$TEMPORARY" 2>/dev/null || true
    (($(count running) == HOSTS)) && return
  fi
  setup_workers && start_workers
}

# How many workers are in a state, of those that the last look reached.
count() { grep -c "^worker [^ ]* $1\$" "$TEMPORARY" || true; }

# Looks until the run has an outcome: finished, bad_input, failed, lost.
watch_workers() {
  local unreachable=0
  while :; do
    pause "$POLL_SECONDS"
    if [[ $DRY_RUN ]]; then
      on_workers poll
      OUTCOME=finished
      return
    fi
    on_workers poll >"$TEMPORARY" || true # who did not answer is counted below
    local running done_ answered
    running=$(count running) done_=$(count 'exit 0') answered=$(count '.*')
    say "$running of $HOSTS workers train, $done_ have finished," \
      "$((HOSTS - answered)) did not answer"
    if (($(count 'exit 2') > 0)); then
      OUTCOME=bad_input
      return
    elif ((done_ == HOSTS)); then
      OUTCOME=finished
      return
    elif ((running + done_ < answered)); then
      OUTCOME=failed
      return
    elif ((answered < HOSTS)); then
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
  done
}

run() {
  local tries=0
  trap interrupted INT TERM
  create_slice || return
  [[ $MADE_HERE ]] || KEEP=yes # it was there before
  OUTCOME=lost
  if launch_workers; then watch_workers; fi
  while [[ $OUTCOME == failed || $OUTCOME == lost ]]; do
    if ((tries == MAX_RETRIES)); then
      say "the run failed; MAX_RETRIES=$MAX_RETRIES used up, giving up."
      return 1
    fi
    tries=$((tries + 1))
    say "workers $OUTCOME; retry $tries of $MAX_RETRIES from the newest" \
      "checkpoint in $RETRY_SECONDS s."
    pause "$RETRY_SECONDS"
    slice_state
    if [[ $OUTCOME == failed && $STATE =~ ^(ACTIVE|UNKNOWN)$ ]]; then
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
    say "the trainer refused its input (exit status 2); no retry mends that."
    stop_workers || true
    return 2
  fi
}

interrupted() {
  trap '' INT TERM
  say "interrupted: saving and stopping; this takes up to $grace s."
  local status=130
  if [[ $COMMAND == run ]] && stop_workers >"$TEMPORARY"; then
    (($(count 'exit 75') == HOSTS)) && status=75
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
KEEP='' FOLLOW='' TEARDOWN=''
for option in ${OPTIONS[@]+"${OPTIONS[@]}"}; do
  case $option in
    --keep) KEEP=yes ;;
    --follow) FOLLOW=yes ;;
    *) fail "unknown option $option; see --help." ;;
  esac
done
COMMAND=${WORDS[0]:-}
((${#WORDS[@]} == 1)) ||
  fail "give one of create, setup, run, status, logs, stop, delete."
load_job "$JOB" PROJECT ZONE ACCELERATOR RUNTIME_VERSION HOSTS
where=(--project="$PROJECT" --zone="$ZONE")
[[ $DRY_RUN || -f $CONFIG ]] || fail "CONFIG=$CONFIG: no such file in $REPO."
(load_secrets "$SECRETS_FILE") || exit # only to check it before anything costs
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

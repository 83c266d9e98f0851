#!/usr/bin/env bash
# The trainer inside a pod, with what tpu_vm.sh does from outside; in the
# manifests that gke.sh makes.
#
#   pod.sh WORKDIR MAX_RETRIES HANG_SECONDS -- COMMAND…
#
# SIGTERM to the pod reaches the trainer, which saves; a trainer that logs no
# step for HANG_SECONDS is ended. The status is the trainer's, but 2 (which the
# cluster does not try again) after MAX_RETRIES failures without a new
# checkpoint in between. Controllers only count restarts and never reset them,
# so failures are counted here, as files of WORKDIR/.failures; preemptions are
# not counted here. Where WORKDIR is gs://… nothing is counted: then
# MAX_PREEMPTIONS is the limit of both.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  usage "$0"
  exit
fi
[[ ${4:-} == -- ]] || fail "unexpected arguments; see --help."
WORKDIR=$1 MAX_RETRIES=$2 HANG_SECONDS=$3 PYTHON=python3
shift 4
FORWARD_AS=TERM # only this script got the pod's

status=0
forward_signals "$@" || status=$?
if [[ $status =~ ^(0|2|75)$ || $STOP_REQUESTED ]]; then
  exit "$status"
fi
[[ $WORKDIR == gs://* ]] && exit "$status"
checkpoint=$(newest_checkpoint)
pod=${MEGASCALE_SLICE_ID:-0}.${TPU_WORKER_ID:-${JOB_COMPLETION_INDEX:-0}}
mkdir -p -- "$WORKDIR/.failures" # or the cluster counts it alone
failures=("$WORKDIR/.failures/${checkpoint:-0}-$pod-"*)
[[ -e ${failures[0]} ]] || failures=()
if ((${#failures[@]} >= MAX_RETRIES)); then
  say "exit status $status, the failure number $((${#failures[@]} + 1)) after" \
    "checkpoint ${checkpoint:-0}: MAX_RETRIES=$MAX_RETRIES used up."
  exit 2
fi
touch -- "$WORKDIR/.failures/${checkpoint:-0}-$pod-$(date +%s)-$$"
exit "$status"

#!/usr/bin/env bash
# Trains on this machine, in the foreground, without retries.
#
#   launch/local.sh --job=FILE [--processes=N] [--dry-run] [-- TRAINER FLAGS]
#
#   --job=FILE      settings of the run: NAME, CONFIG, WORKDIR, FLAGS, …
#                   (launch/README.md lists them; relative paths start at the
#                   repository)
#   --processes=N   rehearse a run of N hosts: N processes that talk to each
#                   other on this machine; the end of one ends all
#   --dry-run       print the commands, run nothing
#   -- FLAGS        further trainer flags, e.g. -- --config.train.num_steps=10
#
# Ctrl-C saves and ends (exit status 75); the same command then continues.
# AUNET_PORT (12355) is where the N processes meet.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

parse_arguments "$0" "$@"
processes=1
for option in ${OPTIONS[@]+"${OPTIONS[@]}"}; do
  case $option in
    --processes=*) processes=${option#--processes=} ;;
    *) fail "unknown option $option; see --help." ;;
  esac
done
((${#WORDS[@]} == 0)) || fail "unexpected argument ${WORDS[0]}; see --help."
[[ $processes =~ ^[1-9][0-9]*$ ]] ||
  fail "--processes=$processes must be a number from 1."
load_job "$JOB"
load_secrets "$SECRETS_FILE"
((${#ENV[@]})) && export "${ENV[@]}"
lock_workdir
train=("$PYTHON" -m aunet_jax.train "${TRAIN_FLAGS[@]}")

# N processes as one command. The first that fails ends the others and gives
# the status; 75 (saved) ends none: a second signal would cut their saving off.
together() {
  local id one children=() left=$processes status=0 signalled=
  trap 'signalled=yes; kill -TERM "${children[@]}" 2>/dev/null || true' INT TERM
  for ((id = 0; id < processes; id++)); do
    "$@" "--process_id=$id" &
    children+=($!)
  done
  while ((left > 0)); do
    one=0
    wait -n || one=$?
    if [[ $signalled ]]; then # the signal ended the wait, not a process
      signalled=
      continue
    fi
    left=$((left - 1))
    if ((one != 0 && status == 0)); then
      status=$one
      ((one == 75)) || kill -TERM "${children[@]}" 2>/dev/null || true
    fi
  done
  return "$status"
}

run=()
if ((processes > 1)); then
  run=(together)
  train+=("--coordinator=127.0.0.1:${AUNET_PORT:-12355}"
    "--num_processes=$processes" "--start_timeout=$START_TIMEOUT")
fi
if [[ $DRY_RUN ]]; then
  perform cd "$REPO"
  ((${#ENV[@]})) && perform export "${ENV[@]}"
  for ((id = 0; id < processes; id++)); do
    ((processes == 1)) || identity=("--process_id=$id")
    perform "${train[@]}" ${identity[@]+"${identity[@]}"}
  done
  exit
fi
say "running $(quoted "${train[@]}")"
forward_signals ${run[@]+"${run[@]}"} "${train[@]}"

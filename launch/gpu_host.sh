#!/usr/bin/env bash
# Trains on all GPUs of this machine, and starts again what stops early.
#
#   launch/gpu_host.sh --job=FILE [--dry-run] [-- TRAINER FLAGS]
#
#   --job=FILE   settings of the run: NAME, CONFIG, WORKDIR, FLAGS, GPUS
#                (refuse to start with fewer), MAX_RETRIES, … (docs/scale.md)
#   --dry-run    print the commands, run nothing
#   -- FLAGS     further trainer flags
#
# Exit status: 0 finished; 2 bad input, which no retry mends; 75 stopped by
# Ctrl-C or SIGTERM with everything saved. After a crash, or a stop that did
# not come through this script, it waits AUNET_RETRY_SECONDS (30) and runs the
# command again, MAX_RETRIES times at most; each try continues from the newest
# checkpoint. To outlive your login: `nohup launch/gpu_host.sh … &`, or tmux.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

parse_arguments "$0" "$@"
((${#OPTIONS[@]} + ${#WORDS[@]} == 0)) ||
  fail "unexpected argument ${OPTIONS[0]-${WORDS[0]-}}; see --help."
load_job "$JOB" GPUS
train=("$PYTHON" -m aunet_jax.train "${TRAIN_FLAGS[@]}")
if [[ $DRY_RUN ]]; then
  perform cd "$REPO"
  perform nvidia-smi --list-gpus
  perform "${train[@]}"
  exit
fi

load_secrets "$SECRETS_FILE"
lock_workdir
check_gpus() {
  local listing seen
  listing=$(nvidia-smi --list-gpus) || return 1
  seen=$(grep -c '^GPU ' <<<"$listing") || true
  if [[ ${CUDA_VISIBLE_DEVICES:-} ]]; then
    seen=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .)
  fi
  ((seen >= GPUS)) && return
  say "GPUS=$GPUS but $seen can be used (nvidia-smi, CUDA_VISIBLE_DEVICES)."
  return 1
}
# A GPU that fell off the bus is a crash like any other: it may come back.
train_once() { check_gpus && forward_signals "${train[@]}"; }

command -v nvidia-smi >/dev/null ||
  fail "nvidia-smi is not on PATH: no NVIDIA driver here? (launch/local.sh" \
    "trains without one)"
check_gpus || fail "start again when the GPUs are there, or change GPUS."
say "running $(quoted "${train[@]}")"
until_finished "0 2 130" train_once

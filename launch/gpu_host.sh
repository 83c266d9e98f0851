#!/usr/bin/env bash
# Trains on all GPUs of this machine, and starts again what stops early.
#
#   launch/gpu_host.sh --job=FILE [--gpus=N] [--dry-run] [-- TRAINER FLAGS]
#
#   --job=FILE   settings of the run: NAME, CONFIG, WORKDIR, FLAGS, GPUS
#                (refuse to start with fewer), … (launch/README.md)
#   --gpus=N     go on with N GPUs, on a mesh that still divides the batch
#   --dry-run    print the commands, run nothing
#   -- FLAGS     further trainer flags
#
# Exit status: 0 finished; 2 bad input, which no retry mends; 75 stopped by
# Ctrl-C or SIGTERM with everything saved. After a crash, or a stop that did
# not come through this script, it waits AUNET_RETRY_SECONDS (30) and runs the
# command again from the newest checkpoint: MAX_RETRIES failures at most, and
# MAX_PREEMPTIONS stops, both counted from the last new checkpoint. A run that
# logs no step for HANG_SECONDS is ended and started again. To outlive your login: `nohup launch/gpu_host.sh … &`, or tmux.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

parse_arguments "$0" "$@"
load_job "$JOB" GPUS
job_gpus=$GPUS
for option in ${OPTIONS[@]+"${OPTIONS[@]}"} ${WORDS[@]+"${WORDS[@]}"}; do
  case $option in
    --gpus=*) resize GPUS "${option#--gpus=}" ;;
    *) fail "unexpected argument $option; see --help." ;;
  esac
done
((GPUS == job_gpus)) || check_job "$job_gpus" "$GPUS" 1
train=("$PYTHON" -m aunet_jax.train "${TRAIN_FLAGS[@]}")
if [[ $DRY_RUN ]]; then
  perform cd "$REPO"
  perform nvidia-smi --list-gpus
  perform export "${RUN_ENV[@]}"
  perform "${train[@]}"
  exit
fi

load_secrets "$SECRETS_FILE"
export "${RUN_ENV[@]}"
if ((GPUS < job_gpus)) && [[ ! ${CUDA_VISIBLE_DEVICES:-} ]]; then
  CUDA_VISIBLE_DEVICES=$(seq -s, 0 $((GPUS - 1)))
  export CUDA_VISIBLE_DEVICES
fi
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

#!/usr/bin/env bash
# One TPU VM's part of tpu_vm.sh, which copies this file there and calls it.
#
#   tpu_worker.sh setup [BUCKET [disk]]
#                                    install what the code needs, mount BUCKET
#                                    and the data disk
#   tpu_worker.sh start WORKDIR KEY=VALUE… -- FLAGS…
#                                    start the trainer, detached from the login
#   tpu_worker.sh poll               print: worker HOST STATE step N checkpoint N
#                                    where STATE is idle, running, dead or exit
#                                    STATUS, and 0 stands for none
#   tpu_worker.sh stop [SECONDS]     SIGTERM, then SIGKILL after SECONDS (300)
#   tpu_worker.sh logs [LINES] [-f]  last lines of the log; -f: and what follows
#
# Below ~/aunet: code/, venv/, run/ (log, exit status), secrets.env (0600),
# mounts (what setup mounted, for a start after a reboot).
# A lock held by the trainer says whether it lives: the kernel gives it back
# whatever way the trainer or the machine ends.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

home=$HOME/aunet PYTHON=$HOME/aunet/venv/bin/python
run=$home/run
mkdir -p "$run"

# Shared: two looks at once must not take each other for a trainer.
lives() { ! flock --shared --nonblock "$run/lock" true; }

setup() {
  printf '%s\n%s\n' "${1:-}" "${2:-}" >"$home/mounts"
  if [[ ! -x $home/venv/bin/python ]]; then
    # Images of TPU VMs may bring a Python older than 3.11; uv brings its own.
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --python 3.12 "$home/venv"
  fi
  # The versions of the lock file, which the image has too.
  python3 -m uv pip install --quiet --python "$home/venv/bin/python" \
    --requirement "$REPO/launch/requirements-tpu.txt"
  python3 -m uv pip install --quiet --python "$home/venv/bin/python" \
    --no-deps --editable "$REPO"
  mount_all
  echo "worker $(hostname) ready"
}

# Mounts what is not mounted (any more: a reboot forgets it).
mount_all() {
  local bucket='' disk=''
  [[ -f $home/mounts ]] && { read -r bucket && read -r disk; } <"$home/mounts"
  [[ $bucket ]] && mount_bucket "$bucket"
  [[ $disk ]] && mount_disk
  return 0
}

# The first disk beside the boot disk, by the name that Compute Engine gives it
# where the request gives none (API of compute v1, AttachedDisk.deviceName).
mount_disk() {
  mountpoint -q /mnt/disk && return
  sudo mkdir -p /mnt/disk
  sudo mount -o ro,noload /dev/disk/by-id/google-persistent-disk-1 /mnt/disk
}

mount_bucket() {
  mountpoint -q /mnt/bucket && return
  if ! command -v gcsfuse >/dev/null; then
    local list key=/usr/share/keyrings/cloud.google.asc
    list="deb [signed-by=$key] https://packages.cloud.google.com/apt"
    list+=" gcsfuse-$(lsb_release -c -s) main"
    curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg |
      sudo tee "$key" >/dev/null
    sudo tee /etc/apt/sources.list.d/gcsfuse.list <<<"$list" >/dev/null
    sudo apt-get update -qq
    sudo apt-get install -qq -y gcsfuse
  fi
  sudo mkdir -p /mnt/bucket
  sudo chown "$(id -u):$(id -g)" /mnt/bucket
  # No metadata cache: each host must see the checkpoints of the others.
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 "$1" /mnt/bucket
}

start() {
  local workdir=$1 variables=()
  shift
  while [[ $1 != -- ]]; do
    variables+=("$1")
    shift
  done
  shift
  exec 9>"$run/lock"
  if ! flock --timeout 5 9; then # a poll holds it for an instant
    echo "worker $(hostname) running already"
    return
  fi
  rm -f "$run/status"
  touch "$run/started"
  load_secrets "$([[ -f $home/secrets.env ]] && echo "$home/secrets.env")"
  ((${#variables[@]})) && export "${variables[@]}"
  mount_all 9>&- # its daemon must not hold the lock
  echo "$workdir" >"$run/workdir"
  cd "$REPO"
  setsid bash "$REPO/launch/tpu_worker.sh" train "$@" \
    </dev/null >>"$run/log" 2>&1 &
  echo $! >"$run/pid" # and its process group
  echo "worker $(hostname) started"
}

# The detached part. It outlives the SIGTERM that a machine's shutdown sends to
# every process, so that the status of a trainer that saved is written down; and
# does not pass it on, as a second one would cut the saving off.
train() {
  local status=0 child=
  echo "$(date -u +%FT%TZ) starting: $(quoted "$@")"
  trap : TERM INT HUP
  trap 'kill -TERM "$child"' USR1
  "$home/venv/bin/python" -m aunet_jax.train "$@" &
  child=$!
  wait "$child" || status=$?
  while kill -0 "$child" 2>/dev/null; do
    status=0
    wait "$child" || status=$?
  done
  echo "$(date -u +%FT%TZ) exit status $status"
  echo "$status" >"$run/status.new"
  mv "$run/status.new" "$run/status"
}

poll() {
  local state=idle
  if lives; then
    state=running
  elif [[ -f $run/status ]]; then
    state="exit $(<"$run/status")"
  elif [[ -f $run/started ]]; then
    state=dead
  fi
  local WORKDIR step checkpoint
  WORKDIR=$(cat "$run/workdir" 2>/dev/null || echo /nowhere)
  if [[ $WORKDIR == gs://* ]]; then
    step=$(bucket_progress) # both at once
    read -r _ step _ checkpoint <<<"${step:-step 0 checkpoint 0}"
  elif [[ $WORKDIR == /mnt/* ]]; then # a bucket may never answer
    read -r step checkpoint < <(timeout 20 bash "$REPO/launch/tpu_worker.sh" \
      progress "$WORKDIR" || true) || true
  else
    read -r step checkpoint < <(progress "$WORKDIR")
  fi
  echo "worker $(hostname) $state step ${step:-0} checkpoint ${checkpoint:-0}"
}

progress() {
  local WORKDIR=$1 step checkpoint
  step=$(newest_step) checkpoint=$(newest_checkpoint)
  echo "${step:-0} ${checkpoint:-0}"
}

stop() {
  if lives; then
    kill -USR1 "$(<"$run/pid")" || true
    if ! flock --shared --timeout "${1:-300}" "$run/lock" true; then
      kill -KILL -- "-$(<"$run/pid")" || true
      flock --shared --timeout 30 "$run/lock" true || true
    fi
  fi
  poll
}

logs() {
  touch "$run/log"
  # A progress line ends in \r.
  tail -n "${1:-20}" ${2:+--retry -F} "$run/log" | tr '\r' '\n' |
    sed -u "s/^/[$(hostname)] /"
}

case ${1:-} in
  setup | start | train | poll | progress | stop | logs) "$@" ;;
  -h | --help) usage "$0" ;;
  *) fail "'${1:-}' is not one of setup, start, poll, stop, logs." ;;
esac

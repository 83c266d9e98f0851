#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster, as a JobSet.
#
#   launch/gke.sh COMMAND --job=FILE [--dry-run] [-- TRAINER FLAGS]
#
#   create   send the JobSet to the cluster; after `stop`: go on. After one that
#            has finished or failed: say so, and with --replace delete it first
#   render   print its manifest
#   status   the JobSet and its pods
#   logs     the last lines of all pods; --follow: and what follows
#   stop     save, and give the TPUs back; `create` goes on from there
#   delete   delete the JobSet
#   xpk      send the run through xpk instead (a cluster made by `xpk cluster
#            create`); it has no stop: delete with `xpk workload delete`
#
#   --job=FILE   PROJECT, ZONE (or region) and CLUSTER, IMAGE, GKE_ACCELERATOR,
#                GKE_TOPOLOGY, CHIPS_PER_HOST, SLICES, BUCKET, …
#                (launch/README.md lists them)
#   --slices=N   go on with N slices of the job's, or
#   --slice=4x4  with slices of another GKE_TOPOLOGY, on a mesh that still
#                divides the batch (create with --replace)
#   --dry-run    print the commands, run nothing
#
# The cluster restarts all pods when one ends early (a crash, a preemption, a
# dead node), not on bad input: MAX_PREEMPTIONS times at most, and after
# MAX_RETRIES failures without a new checkpoint (pod.sh) not again. First, once:
#   gcloud container clusters get-credentials CLUSTER --project=… --zone=…
# (needs gke-gcloud-auth-plugin). Secrets: `kubectl create secret generic NAME
# --from-env-file=FILE`, and SECRET=NAME in the job file.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

parse_arguments "$0" "$@"
FOLLOW='' REPLACE='' slices='' slice=''
for option in ${OPTIONS[@]+"${OPTIONS[@]}"}; do
  case $option in
    --follow) FOLLOW=yes ;;
    --replace) REPLACE=yes ;;
    --slices=*) slices=${option#--slices=} ;;
    --slice=*) slice=${option#--slice=} ;;
    *) fail "unknown option $option; see --help." ;;
  esac
done
((${#WORDS[@]} == 1)) ||
  fail "give one of create, render, status, logs, stop, delete, xpk."
load_job "$JOB" PROJECT ZONE CLUSTER IMAGE BUCKET GKE_ACCELERATOR \
  GKE_TOPOLOGY CHIPS_PER_HOST

# Chips of a topology.
CHIPS=''
size_of() {
  local side product=1
  [[ $1 =~ ^[1-9][0-9]*(x[1-9][0-9]*)+$ ]] ||
    fail "GKE_TOPOLOGY=$1 must be the chips along each side, as 4x8 or 2x2x4."
  for side in ${1//x/ }; do product=$((product * side)); done
  CHIPS=$product
  ((CHIPS % CHIPS_PER_HOST == 0)) ||
    fail "GKE_TOPOLOGY=$1 has $CHIPS chips, not a multiple of" \
      "CHIPS_PER_HOST=$CHIPS_PER_HOST."
}

size_of "$GKE_TOPOLOGY"
[[ ${HOSTS:-$((CHIPS / CHIPS_PER_HOST))} == "$((CHIPS / CHIPS_PER_HOST))" ]] ||
  fail "$JOB: HOSTS=$HOSTS but GKE_TOPOLOGY=$GKE_TOPOLOGY with" \
    "CHIPS_PER_HOST=$CHIPS_PER_HOST has $((CHIPS / CHIPS_PER_HOST)); leave" \
    "HOSTS out."
SLICES=${SLICES:-1} NAMESPACE=${NAMESPACE:-default}
job_devices=$((CHIPS * SLICES))
[[ $slice ]] && GKE_TOPOLOGY=$slice && size_of "$slice"
[[ $slices ]] && resize SLICES "$slices"
HOSTS=$((CHIPS / CHIPS_PER_HOST))
devices=$((CHIPS * SLICES))
# How many devices JAX sees of a TPU7x chip is not known here: no mesh check.
[[ $GKE_ACCELERATOR == tpu7x ]] && job_devices=0 devices=0
[[ $SECRETS_FILE ]] && fail "SECRETS_FILE=$SECRETS_FILE cannot reach pods;" \
  "make a Kubernetes secret of it and set SECRET (see --help)."
[[ $DRY_RUN || -f $CONFIG ]] || fail "CONFIG=$CONFIG: no such file in $REPO."

# SERVICE_ACCOUNT was once the Kubernetes one here, and Google's in tpu_vm.sh.
account=${KUBERNETES_ACCOUNT:-default}
if [[ ! ${KUBERNETES_ACCOUNT:-} && ${SERVICE_ACCOUNT:-} &&
  $SERVICE_ACCOUNT != *@* ]]; then
  account=$SERVICE_ACCOUNT
fi
# Named in full, so that no other cluster can get the command.
kubectl=(kubectl "--context=gke_${PROJECT}_${ZONE}_$CLUSTER"
  "--namespace=$NAMESPACE")
if [[ ${WORDS[0]} =~ ^(create|render|xpk)$ ]]; then
  [[ $WORKDIR == /* || $WORKDIR == gs://* ]] ||
    fail "WORKDIR=$WORKDIR would be lost with the pods: name gs://BUCKET/PATH, or" \
      "a directory that all pods see, below /mnt/bucket."
  check_job "$job_devices" "$devices" "$SLICES" \
    "$REPO/launch/requirements-tpu.txt"
  [[ $IMAGE == *@sha256:* ]] ||
    say "warning: IMAGE=$IMAGE has no digest (@sha256:…): a restart may get" \
      "another image than the run began with."
fi
train=(bash /aunet/launch/pod.sh "$WORKDIR" "$MAX_RETRIES" "$HANG_SECONDS" --
  python3 -m aunet_jax.train "${TRAIN_FLAGS[@]}" --multihost
  --num_processes="$((HOSTS * SLICES))" --start_timeout="$START_TIMEOUT")
render=(python3 "$REPO/launch/gke_manifest.py" "NAME=$NAME"
  "NAMESPACE=$NAMESPACE" "MAX_PREEMPTIONS=$MAX_PREEMPTIONS" "SLICES=$SLICES"
  "HOSTS=$HOSTS" "IMAGE=$IMAGE" "SERVICE_ACCOUNT=$account"
  "GKE_ACCELERATOR=$GKE_ACCELERATOR" "GKE_TOPOLOGY=$GKE_TOPOLOGY"
  "CHIPS_PER_HOST=$CHIPS_PER_HOST" "BUCKET=$BUCKET" "SPOT=$SPOT"
  "SECRET=${SECRET:-}" "QUEUE=${QUEUE:-}" "RESERVATION=${RESERVATION:-}"
  "${RUN_ENV[@]/#/env:}" -- "${train[@]}")

# The JobSet's condition that is true, if it has one (JobSet,
# api/jobset/v1alpha2/jobset_types.go: Completed, Failed, Suspended, …).
conditions=("${kubectl[@]}" get jobset "$NAME" --ignore-not-found
  '--output=jsonpath={.status.conditions[?(@.status=="True")].type}')

# Makes room for `create`: a JobSet that has ended is never started again.
clear_ended() {
  local found ended=''
  found=$("${conditions[@]}") || return
  [[ " $found " == *' Completed '* ]] && ended=finished
  [[ " $found " == *' Failed '* ]] && ended=failed
  if [[ $REPLACE ]]; then
    "${kubectl[@]}" delete jobset "$NAME" --ignore-not-found
  elif [[ $ended ]]; then
    fail "the JobSet $NAME is there and has $ended (see status, logs);" \
      "applying it again would start nothing. create --replace deletes it" \
      "and goes on from the newest checkpoint of WORKDIR."
  fi
}

case ${WORDS[0]} in
  render) perform "${render[@]}" ;;
  create)
    if [[ $DRY_RUN ]]; then
      perform "${conditions[@]}"
      [[ $REPLACE ]] &&
        perform "${kubectl[@]}" delete jobset "$NAME" --ignore-not-found
      echo "$(quoted "${render[@]}") | $(quoted "${kubectl[@]}" apply -f -)"
    else
      manifest=$("${render[@]}")
      clear_ended
      "${kubectl[@]}" apply -f - <<<"$manifest"
    fi
    ;;
  status)
    perform "${kubectl[@]}" get jobset "$NAME"
    perform "${kubectl[@]}" get pods -o wide \
      "--selector=jobset.sigs.k8s.io/jobset-name=$NAME"
    ;;
  logs)
    perform "${kubectl[@]}" logs --container=train --prefix --tail=20 \
      "--max-log-requests=$((HOSTS * SLICES))" \
      "--selector=jobset.sigs.k8s.io/jobset-name=$NAME" ${FOLLOW:+--follow}
    ;;
  stop)
    # Kueue starts and suspends its JobSets itself: what is to stop, goes; all
    # that matters is in WORKDIR.
    if [[ ${QUEUE:-} ]]; then
      perform "${kubectl[@]}" delete jobset "$NAME" --ignore-not-found
      exit
    fi
    perform "${kubectl[@]}" patch jobset "$NAME" --type=merge \
      '--patch={"spec":{"suspend":true}}'
    ;;
  delete)
    perform "${kubectl[@]}" delete jobset "$NAME" --ignore-not-found
    ;;
  xpk)
    [[ ${XPK_TPU_TYPE:-} ]] || fail "$JOB: set XPK_TPU_TYPE, e.g. v6e-32."
    xpk=(xpk workload create "--workload=$NAME" "--cluster=$CLUSTER"
      "--project=$PROJECT" "--zone=$ZONE" "--tpu-type=$XPK_TPU_TYPE"
      "--num-slices=$SLICES" "--docker-image=$IMAGE"
      "--max-restarts=$MAX_PREEMPTIONS" "--command=$(quoted "${train[@]}")")
    # Without it xpk restarts after 42 and 127 to 255 only (xpk 1.16,
    # commands/workload.py:get_restart_exit_codes), so neither after a failure
    # (1) nor after a preemption that saved (75). All but 2:
    xpk+=("--restart-on-exit-codes=1,3-126" "${RUN_ENV[@]/#/--env=}")
    [[ ${XPK_STORAGE:-} ]] && xpk+=("--storage=$XPK_STORAGE")
    [[ $SPOT == yes ]] && xpk+=(--spot)
    [[ ${SECRET:-} ]] && say "warning: xpk's pods do not get SECRET=$SECRET."
    perform "${xpk[@]}"
    ;;
  *) fail "${WORDS[0]} is not one of create, render, status, logs, stop," \
    "delete, xpk." ;;
esac

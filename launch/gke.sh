#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster, as a JobSet.
#
#   launch/gke.sh COMMAND --job=FILE [--dry-run] [-- TRAINER FLAGS]
#
#   create   send the JobSet to the cluster; after `stop`: go on
#   render   print its manifest
#   status   the JobSet and its pods
#   logs     the last lines of all pods; --follow: and what follows
#   stop     save, and give the TPUs back; `create` goes on from there
#   delete   delete the JobSet
#   xpk      send the run through xpk instead (a cluster made by `xpk cluster
#            create`); it has no stop: delete with `xpk workload delete`
#
#   --job=FILE   PROJECT, ZONE (or region) and CLUSTER, IMAGE, GKE_ACCELERATOR,
#                GKE_TOPOLOGY, HOSTS (of a slice), SLICES, CHIPS_PER_HOST,
#                BUCKET, … (docs/scale.md lists them)
#   --dry-run    print the commands, run nothing
#
# The cluster restarts all pods when one ends early (a crash, a preemption, a
# dead node), MAX_RETRIES times at most, and not on bad input. First, once:
#   gcloud container clusters get-credentials CLUSTER --project=… --zone=…
# (needs gke-gcloud-auth-plugin). Secrets: `kubectl create secret generic NAME
# --from-env-file=FILE`, and SECRET=NAME in the job file.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

parse_arguments "$0" "$@"
FOLLOW=''
for option in ${OPTIONS[@]+"${OPTIONS[@]}"}; do
  [[ $option == --follow ]] || fail "unknown option $option; see --help."
  FOLLOW=yes
done
((${#WORDS[@]} == 1)) ||
  fail "give one of create, render, status, logs, stop, delete, xpk."
load_job "$JOB" PROJECT ZONE CLUSTER IMAGE HOSTS BUCKET GKE_ACCELERATOR \
  GKE_TOPOLOGY CHIPS_PER_HOST
SLICES=${SLICES:-1} NAMESPACE=${NAMESPACE:-default}
[[ $SECRETS_FILE ]] && fail "SECRETS_FILE=$SECRETS_FILE cannot reach pods;" \
  "make a Kubernetes secret of it and set SECRET (see --help)."
[[ $DRY_RUN || -f $CONFIG ]] || fail "CONFIG=$CONFIG: no such file in $REPO."

# Named in full, so that no other cluster can get the command.
kubectl=(kubectl "--context=gke_${PROJECT}_${ZONE}_$CLUSTER"
  "--namespace=$NAMESPACE")
train=(python3 -m aunet_jax.train "${TRAIN_FLAGS[@]}" --multihost
  --num_processes="$((HOSTS * SLICES))" --start_timeout="$START_TIMEOUT")
render=(python3 "$REPO/launch/gke_manifest.py" "NAME=$NAME"
  "NAMESPACE=$NAMESPACE" "MAX_RETRIES=$MAX_RETRIES" "SLICES=$SLICES"
  "HOSTS=$HOSTS" "IMAGE=$IMAGE" "SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-default}"
  "GKE_ACCELERATOR=$GKE_ACCELERATOR" "GKE_TOPOLOGY=$GKE_TOPOLOGY"
  "CHIPS_PER_HOST=$CHIPS_PER_HOST" "BUCKET=$BUCKET" "SPOT=$SPOT"
  "SECRET=${SECRET:-}" -- "${train[@]}")

case ${WORDS[0]} in
  render) perform "${render[@]}" ;;
  create)
    if [[ $DRY_RUN ]]; then
      echo "$(quoted "${render[@]}") | $(quoted "${kubectl[@]}" apply -f -)"
    else
      manifest=$("${render[@]}")
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
      "--max-restarts=$MAX_RETRIES" "--command=$(quoted "${train[@]}")")
    [[ $SPOT == yes ]] && xpk+=(--spot)
    [[ ${SECRET:-} ]] && say "warning: xpk's pods do not get SECRET=$SECRET."
    perform "${xpk[@]}"
    ;;
  *) fail "${WORDS[0]} is not one of create, render, status, logs, stop," \
    "delete, xpk." ;;
esac

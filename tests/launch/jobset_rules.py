"""What a cluster asks of a JobSet before it takes it, as far as ours go.

Schemas: the fields of the custom resource and of the Kubernetes objects inside
it that our template uses, with their types; any other field is refused, so a
misspelt one is found. Rules: what the admission webhooks say beyond types. Each
names the file it was read from.
"""

import re

_DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")  # RFC 1035
# kubernetes-sigs/jobset, pkg/webhooks/jobset_webhook.go: ruleNameFmt, 1 to 128
# characters; validOnJobFailureReasons.
_RULE_NAME = re.compile(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?")
_REASONS = {
  "BackoffLimitExceeded",
  "DeadlineExceeded",
  "FailedIndexes",
  "MaxFailedIndexesExceeded",
  "PodFailurePolicy",
}
# The same, api/jobset/v1alpha2/jobset_types.go: FailurePolicyAction.
_ACTIONS = {
  "FailJobSet",
  "RestartJobSet",
  "RestartJobSetAndIgnoreMaxRestarts",
  "RestartJob",
  "RestartJobAndIgnoreMaxRestarts",
}
# Kubernetes, apimachinery/pkg/api/resource/quantity.go, the forms in use.
_QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?")
_SIDECAR = "gke-gcsfuse/"

STRINGS = {"*": str}
# Kubernetes API reference: batch/v1 Job, core/v1 Pod.
POD = {
  "restartPolicy": str,
  "hostNetwork": bool,
  "dnsPolicy": str,
  "serviceAccountName": str,
  "terminationGracePeriodSeconds": int,
  "nodeSelector": STRINGS,
  "tolerations": [{"key": str, "operator": str, "value": str, "effect": str}],
  "containers": [
    {
      "name": str,
      "image": str,
      "command": [str],
      "env": [{"name": str, "value": str}],
      "envFrom": [{"secretRef": {"name": str}}],
      "ports": [{"containerPort": int}],
      "resources": {"requests": {"*": int}, "limits": {"*": int}},
      "volumeMounts": [{"name": str, "mountPath": str}],
    }
  ],
  "volumes": [
    {"name": str, "csi": {"driver": str, "volumeAttributes": STRINGS}}
  ],
}
JOB = {
  "completionMode": str,
  "parallelism": int,
  "completions": int,
  "backoffLimit": int,
  "podFailurePolicy": {
    "rules": [
      {
        "action": str,
        "onExitCodes": {"containerName": str, "operator": str, "values": [int]},
      }
    ]
  },
  "template": {"metadata": {"annotations": STRINGS}, "spec": POD},
}
# kubernetes-sigs/jobset, api/jobset/v1alpha2/jobset_types.go.
JOBSET = {
  "apiVersion": str,
  "kind": str,
  "metadata": {
    "name": str,
    "namespace": str,
    "labels": STRINGS,
    "annotations": STRINGS,
  },
  "spec": {
    "suspend": bool,
    "failurePolicy": {
      "maxRestarts": int,
      "rules": [{"name": str, "action": str, "onJobFailureReasons": [str]}],
    },
    "replicatedJobs": [
      {"name": str, "replicas": int, "template": {"spec": JOB}}
    ],
  },
}


def _types(value, schema, path: str) -> list[str]:
  if isinstance(schema, dict):
    if not isinstance(value, dict):
      return [f"{path} must be an object"]
    found = []
    for key, item in value.items():
      known = schema.get(key, schema.get("*"))
      if known is None:
        found.append(f"{path}.{key} is not a field")
      else:
        found += _types(item, known, f"{path}.{key}")
    return found
  if isinstance(schema, list):
    if not isinstance(value, list):
      return [f"{path} must be a list"]
    return [
      line
      for i, item in enumerate(value)
      for line in _types(item, schema[0], f"{path}[{i}]")
    ]
  return [] if type(value) is schema else [f"{path} must be {schema.__name__}"]


def broken(manifest: dict) -> list[str]:
  """The rules a manifest breaks, in words; empty: it would be admitted."""
  found = _types(manifest, JOBSET, "jobset")
  if found:
    return found

  def rule(holds: bool, words: str) -> None:
    if not holds:
      found.append(words)

  name, spec = manifest["metadata"]["name"], manifest["spec"]
  names = {job["name"] for job in spec["replicatedJobs"]}
  policy = spec["failurePolicy"]
  rule_names = [one["name"] for one in policy["rules"]]
  rule(len(set(rule_names)) == len(rule_names), "rule names repeat")
  for one in policy["rules"]:
    rule(
      bool(_RULE_NAME.fullmatch(one["name"])) and len(one["name"]) <= 128,
      f"failure-policy rule name {one['name']!r}",
    )
    rule(one["action"] in _ACTIONS, f"action {one['action']}")
    rule(set(one["onJobFailureReasons"]) <= _REASONS, "job failure reason")
  for job in spec["replicatedJobs"]:
    body = job["template"]["spec"]
    # jobset_webhook.go: job and pod names are RFC 1035 labels of up to 63
    # characters, with the largest indices and a suffix of 5.
    longest = f"{name}-{job['name']}-{job['replicas'] - 1}"
    longest += f"-{body['completions'] - 1}-abcde"
    rule(
      bool(_DNS_LABEL.fullmatch(longest)) and len(longest) <= 63,
      f"pod name {longest}",
    )
    rule(bool(names), "no replicated job")
    # Kubernetes API reference, batch/v1 PodFailurePolicyOnExitCodesRequirement:
    # the container is one of the pod's; values are sorted, unique and, for In,
    # without 0. restartPolicy: docs of Jobs, "Pod failure policy".
    pod = body["template"]["spec"]
    containers = {one["name"] for one in pod["containers"]}
    rule(pod["restartPolicy"] == "Never", "restartPolicy")
    for one in body["podFailurePolicy"]["rules"]:
      codes = one["onExitCodes"]
      rule(codes["containerName"] in containers, "containerName")
      rule(codes["operator"] in ("In", "NotIn"), "operator")
      rule(codes["values"] == sorted(set(codes["values"])), "exit codes")
      rule(0 not in codes["values"], "exit code 0")
    # As the TPU template of xpk 1.16, commands/workload.py: slices meet in the
    # host's network, and there find the JobSet's names only with this policy.
    rule(pod.get("hostNetwork") is True, "no hostNetwork")
    rule(
      pod.get("dnsPolicy") == "ClusterFirstWithHostNet",
      "hostNetwork needs dnsPolicy ClusterFirstWithHostNet",
    )
    mounted = {one["name"] for one in pod["volumes"]}
    for container in pod["containers"]:
      used = {one["name"] for one in container["volumeMounts"]}
      rule(used <= mounted, "volumeMounts name a volume that is not there")
      # Kubernetes docs, extended resources: requests and limits are equal.
      resources = container["resources"]
      rule(resources.get("requests") == resources["limits"], "google.com/tpu")
      rule(
        all(not re.search(r"(?<!\$)\$\(", w) for w in container["command"]),
        "the command has a $( that Kubernetes would expand",
      )
    # GoogleCloudPlatform/gcs-fuse-csi-driver, pkg/webhook/mutatingwebhook.go
    # and config.go: quantities by annotation; "0" is no limit, which then needs
    # its request said, or the sidecar's default applies (250m, 256Mi, 5Gi).
    annotations = body["template"]["metadata"]["annotations"]
    uses_bucket = any(
      one["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
      for one in pod["volumes"]
    )
    if uses_bucket:
      rule(annotations.get(_SIDECAR + "volumes") == "true", "no sidecar")
      for what in ("cpu", "memory", "ephemeral-storage"):
        for kind in ("request", "limit"):
          quantity = annotations.get(f"{_SIDECAR}{what}-{kind}", "")
          rule(
            bool(_QUANTITY.fullmatch(quantity)),
            f"sidecar {what} {kind} {quantity!r}",
          )
        rule(
          annotations.get(f"{_SIDECAR}{what}-limit") == "0",
          f"sidecar {what} is limited: it is ended while it uploads",
        )
    # xpk 1.16, core/system_characteristics.py: accelerators by their names in
    # GKE (TPU7x: tpu7x), and a side for each dimension of the torus.
    selector = pod["nodeSelector"]
    sides = selector["cloud.google.com/gke-tpu-topology"].split("x")
    wanted = {
      "tpu-v4-podslice": 3,
      "tpu-v5-lite-podslice": 2,
      "tpu-v5p-slice": 3,
      "tpu-v6e-slice": 2,
      "tpu7x": 3,
    }.get(selector["cloud.google.com/gke-tpu-accelerator"])
    rule(wanted == len(sides), f"accelerator or topology of {selector}")
    chips = 1
    for side in sides:
      chips *= int(side)
    tpus = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
    rule(chips == tpus * body["parallelism"], "hosts x chips is not the slice")
  # kubernetes-sigs/kueue, site/content/en/docs/tasks/run/jobsets.md: the label
  # names a LocalQueue. That ours begin suspended is our own rule: nothing may
  # start before Kueue admits it, should its webhook be away.
  queue = (
    manifest["metadata"].get("labels", {}).get("kueue.x-k8s.io/queue-name")
  )
  rule(bool(queue) == spec["suspend"], "a queue and suspend go together")
  return found

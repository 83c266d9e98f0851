#!/usr/bin/env python3
"""Prints the JobSet of a job, from jobset.yaml; called by gke.sh.

  gke_manifest.py [NAME=VALUE ...] [env:NAME=VALUE ...] -- COMMAND

Every {{KEY}} of the template becomes JSON, which is YAML too, so no value can
change the shape of the manifest, whatever characters it has. Standard library
only. Exit status 2 where a setting is missing or unknown.
"""

import json
import re
import sys
from pathlib import Path

TEMPLATE = Path(__file__).with_name("jobset.yaml")
NUMBERS = ("HOSTS", "SLICES", "CHIPS_PER_HOST", "MAX_PREEMPTIONS")


def render(template: str, settings: dict[str, str], command: list[str]) -> str:
  """The manifest.

  Args:
    template: YAML with {{KEY}} where a value goes.
    settings: of the job file, and env:NAME for the container's environment;
      SECRET, QUEUE and RESERVATION may be "" (none), the rest not.
    command: the container's command, each word as it is.
  Raises: ValueError naming the missing or unknown setting.
  """
  selector = {
    "cloud.google.com/gke-tpu-accelerator": settings["GKE_ACCELERATOR"],
    "cloud.google.com/gke-tpu-topology": settings["GKE_TOPOLOGY"],
  }
  tolerations = [
    {"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}
  ]
  if settings["SPOT"] == "yes":
    selector["cloud.google.com/gke-spot"] = "true"
    tolerations.append(
      {"key": "cloud.google.com/gke-spot", "operator": "Exists"}
    )
  if settings["RESERVATION"]:
    selector["cloud.google.com/reservation-name"] = settings["RESERVATION"]
  values = {
    key: int(value) if key in NUMBERS else value
    for key, value in settings.items()
  }
  queue = settings["QUEUE"]
  secret = settings["SECRET"]
  values |= {
    "COMMAND": [_verbatim(word) for word in command],
    "ENV": [
      {"name": key.removeprefix("env:"), "value": _verbatim(value)}
      for key, value in settings.items()
      if key.startswith("env:")
    ],
    # Kueue admits what names a queue, and starts it itself.
    "LABELS": {"kueue.x-k8s.io/queue-name": queue} if queue else {},
    "SUSPEND": bool(queue),
    "NODE_SELECTOR": selector,
    "TOLERATIONS": tolerations,
    "ENV_FROM": [{"secretRef": {"name": secret}}] if secret else [],
  }

  def value(match: re.Match) -> str:
    if match[1] not in values:
      raise ValueError(f"{TEMPLATE.name} wants {match[1]}: give {match[1]}=…")
    return json.dumps(values[match[1]])

  return re.sub(r"\{\{(\w+)\}\}", value, template)


def _verbatim(word: str) -> str:
  """Kubernetes expands $(NAME) in commands and values; $$ stands for one $."""
  return word.replace("$(", "$$(")


def main(arguments: list[str]) -> int:
  try:
    split = arguments.index("--")
    settings = dict(item.split("=", 1) for item in arguments[:split])
    manifest = render(TEMPLATE.read_text(), settings, arguments[split + 1 :])
  except KeyError as error:
    print(f"error: give {error.args[0]}=…", file=sys.stderr)
    return 2
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  print(manifest, end="")
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))

"""Manifests, pods and xpk: what a cluster refuses, and what a pod passes on."""

import shlex
import signal
import subprocess

import jobset_rules
import pytest
from launch_world import LAUNCH, NASTY


def test_gke_manifest(world):
  yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
  world.job("SLICES=2 QUEUE=our-queue RESERVATION=mine")
  result = world.run("gke.sh", "create")
  assert result.returncode == 0
  assert "IMAGE=repo/image:1 has no digest" in result.stderr
  *_, call = world.calls("kubectl")
  assert call[1] == "--context=gke_my-project_my-zone_my-cluster"
  assert call[-3:] == ["apply", "-f", "-"]
  manifest = yaml.safe_load((world.fake / "kubectl.stdin").read_text())
  assert jobset_rules.broken(manifest) == []
  assert manifest["kind"] == "JobSet" and manifest["metadata"]["name"] == "test"
  assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 4
  (job,) = manifest["spec"]["replicatedJobs"]
  assert job["replicas"] == 2
  spec = job["template"]["spec"]
  assert spec["parallelism"] == spec["completions"] == 4
  (rule,) = spec["podFailurePolicy"]["rules"]
  assert rule["onExitCodes"]["values"] == [2]
  pod = spec["template"]["spec"]
  assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
  assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
  assert pod["nodeSelector"]["cloud.google.com/reservation-name"] == "mine"
  (container,) = pod["containers"]
  command = [word.replace("$$(", "$(") for word in container["command"]]
  assert f"--config.train.sample_prompt={NASTY}" in command
  assert "--num_processes=8" in command  # 2 slices of 4 hosts
  environment = {one["name"]: one["value"] for one in container["env"]}
  assert environment == {
    "JAX_COMPILATION_CACHE_DIR": f"{world.workdir}/compiled",
    "XLA_FLAGS": NASTY.replace("$(", "$$("),
  }
  assert container["envFrom"] == [{"secretRef": {"name": "my-secret"}}]
  assert container["resources"]["limits"] == {"google.com/tpu": 4}
  labels = manifest["metadata"]["labels"]
  assert labels == {"kueue.x-k8s.io/queue-name": "our-queue"}
  assert manifest["spec"]["suspend"] is True


def test_the_rules_find_what_a_cluster_refuses(world):
  yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
  text = world.run("gke.sh", "render").stdout
  for old, new, words in (
    ("name: badInput", "name: bad-input", "rule name"),
    ("cpu-limit", "cpu-limits", "sidecar cpu limit"),
    ("hostNetwork: true", "hostNetwork: false", "no hostNetwork"),
    ("ClusterFirstWithHostNet", "ClusterFirst", "needs dnsPolicy"),
    ("backoffLimit: 0", 'backoffLimit: "0"', "must be int"),
    ("restartPolicy: Never", "restartPolice: Never", "not a field"),
    ("parallelism: 4", "parallelism: 8", "not the slice"),
  ):
    assert old in text
    found = jobset_rules.broken(yaml.safe_load(text.replace(old, new)))
    assert any(words in line for line in found), (new, found)


def test_gke_takes_a_tpu7x_topology_and_an_image_by_its_digest(world):
  yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
  image = f"repo/image@sha256:{'0' * 64}"
  world.job(f"GKE_ACCELERATOR=tpu7x GKE_TOPOLOGY=4x4x4 IMAGE={image}")
  result = world.run("gke.sh", "render")
  assert "digest" not in result.stderr and f'image: "{image}"' in result.stdout
  assert jobset_rules.broken(yaml.safe_load(result.stdout)) == []


@pytest.mark.parametrize(
  "conditions, word", [("Completed", "finished"), ("Failed", "failed")]
)
def test_gke_create_after_an_end_says_so_and_replaces(world, conditions, word):
  world.write("kubectl.stdout", conditions)
  result = world.run("gke.sh", "create")
  assert result.returncode == 2
  assert f"has {word}" in result.stderr and "--replace" in result.stderr
  verbs = lambda: [call[3] for call in world.calls("kubectl")]  # noqa: E731
  assert verbs() == ["get"]
  assert world.run("gke.sh", "create", "--replace").returncode == 0
  assert verbs() == ["get", "get", "delete", "apply"]


def test_gke_create_goes_on_with_a_suspended_one(world):
  world.write("kubectl.stdout", "Suspended")
  assert world.run("gke.sh", "create").returncode == 0
  assert [call[3] for call in world.calls("kubectl")] == ["get", "apply"]


def pod(world, *command, hang="0", **variables) -> int:
  return subprocess.run(
    [LAUNCH / "pod.sh", world.workdir, "2", hang, "--", *command],
    env=world.environment | variables,
    capture_output=True,
  ).returncode


def test_a_pod_fails_for_good_after_failures_without_a_new_checkpoint(world):
  """The cluster restarts it on 1 and 137, never on 2."""
  fail = ["bash", "-c", "exit 1"]
  stopped = ["bash", "-c", "exit 75"]
  assert [pod(world, *fail), pod(world, *stopped)] == [1, 75]
  assert [pod(world, *fail, TPU_WORKER_ID="1"), pod(world, *fail)] == [1, 1]
  (world.workdir / "checkpoints/100").mkdir(parents=True)  # progress
  assert [pod(world, *fail), pod(world, *fail), pod(world, *fail)] == [1, 1, 2]
  assert pod(world, "true") == 0


def test_a_pod_whose_training_hangs_fails(world):
  world.write("trainer.plan", "frozen\n")
  assert pod(world, world.bin / "trainer", hang="1") == 137


def test_failures_of_a_workdir_in_a_bucket_are_left_to_the_cluster(world):
  pod = [LAUNCH / "pod.sh", "gs://bucket/x", "0", "0", "--", "bash", "-c"]
  for status in (1, 137):
    end = subprocess.run([*pod, f"exit {status}"], env=world.environment)
    assert end.returncode == status


def test_a_pod_passes_its_stop_on_and_keeps_the_status(world):
  process = subprocess.Popen(
    [LAUNCH / "pod.sh", world.workdir, "2", "0", "--", world.bin / "trainer"],
    env=world.environment,
  )
  world.write("trainer.plan", "run\n")
  world.wait_for("trainer.training")
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=30) == 75
  assert (world.fake / "trainer.signals").read_text() == "TERM\n"


def test_gke_passes_on_a_refusal_and_keeps_secret_files_out(world):
  world.write("kubectl.plan", "1\n")
  assert world.run("gke.sh", "create").returncode == 1
  world.job("SECRETS_FILE=x")
  result = world.run("gke.sh", "create")
  assert result.returncode == 2 and "Kubernetes secret" in result.stderr


def test_gke_manifest_names_a_missing_setting():
  result = subprocess.run(
    [LAUNCH / "gke_manifest.py", "NAME=x", "--", "train"],
    capture_output=True,
    text=True,
  )
  assert result.returncode == 2 and "GKE_ACCELERATOR" in result.stderr


def test_xpk_gets_the_command_as_one_word(world):
  assert world.run("gke.sh", "xpk").returncode == 0
  (call,) = world.calls("xpk")
  command = [word for word in call if word.startswith("--command=")][0]
  words = shlex.split(command.removeprefix("--command="))
  assert words[1] == "/aunet/launch/pod.sh"
  assert words[6:9] == ["python3", "-m", "aunet_jax.train"]
  assert f"--config.train.sample_prompt={NASTY}" in words
  # Its own are 42 and 127 to 255: it would not restart on 1 nor on 75.
  assert "--restart-on-exit-codes=1,3-126" in call
  assert f"--env=XLA_FLAGS={NASTY}" in call

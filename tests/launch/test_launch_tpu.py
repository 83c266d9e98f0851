"""tpu_vm.sh and its workers on a small cloud, and what fails there."""

import os
import shlex
import signal

import pytest
from launch_world import EVERY_REQUEST, FAKES, NASTY, WORKERS, World, read_until


def plan(world: World, words: str) -> None:
  """What the trainers do, start by start: "0 run" is worker 0, then 1, …

  Rounds are separated by commas; workers without a word succeed.
  """
  rounds = [part.split() for part in words.split(",")]
  for worker in range(WORKERS):
    lines = [(part + ["0"] * WORKERS)[worker] for part in rounds]
    world.write(f"worker{worker}.plan", "\n".join(lines) + "\n")


def test_tpu_run_trains_on_every_worker_and_deletes_the_slice(world):
  result = world.run("tpu_vm.sh", "run")
  assert result.returncode == 0, result.stderr
  starts = world.starts()
  assert sorted(start[0] for start in starts) == [
    f"worker{i}" for i in range(WORKERS)
  ]
  for start in starts:
    assert start[1:3] == ["-m", "aunet_jax.train"]
    assert f"--config.train.sample_prompt={NASTY}" in start
    assert {"--multihost", f"--num_processes={WORKERS}"} <= set(start)
  assert world.slice_calls() == ["create", "delete"]
  assert not (world.fake / "state").exists()


def test_tpu_workers_tell_how_far_a_run_in_a_bucket_is(world):
  world.job(
    "WORKDIR=gs://bucket/runs/x\n"
    "FLAGS+=(--config.data.cache_dir=/tmp/aunet_data)"
  )
  plan(world, "5:1 5:run, 6:0 6:0")
  result = world.run("tpu_vm.sh", "run")
  assert result.returncode == 0, result.stderr
  assert "(step 5)" in result.stderr and "(step 6)" in result.stderr
  assert not (world.fake / "workers/0/gs:").exists()


def test_tpu_workers_mount_the_bucket(world):
  world.write("mountpoint.plan", "1\n")  # one of them has it already, or none
  assert world.run("tpu_vm.sh", "run").returncode == 0
  mounts = world.calls("gcsfuse")
  assert mounts and all(
    call[-2:] == ["my-bucket", "/mnt/bucket"] for call in mounts
  )


@pytest.mark.parametrize(
  "outcomes, status, created",
  [
    (["RESOURCE_EXHAUSTED: There is no more capacity in the zone"], 0, 2),
    (["failed", "failed"], 0, 3),
    (["failed"] * 9, 1, 5),  # MAX_PREEMPTIONS=4
    (["RESOURCE_EXHAUSTED: no more capacity"] * 9, 1, 5),
    (["RESOURCE_EXHAUSTED: Quota limit 'TPUV5s' has been exceeded"], 2, 1),
    (["PERMISSION_DENIED: not yours"], 2, 1),
  ],
)
def test_tpu_create_asks_again_where_that_helps(
  world, outcomes, status, created
):
  world.write("create.plan", "\n".join(outcomes) + "\n")
  result = world.run("tpu_vm.sh", "create")
  assert result.returncode == status, result.stderr
  assert world.slice_calls().count("create") == created
  assert (world.fake / "state").exists() == (status == 0)


def test_tpu_create_interrupted_leaves_nothing_that_costs(world):
  world.write("create.plan", "waiting\n")
  result = world.interrupt("tpu_vm.sh", "create", after="state")
  assert result.returncode == 130
  assert world.slice_calls() == ["create", "delete"]
  assert not (world.fake / "state").exists()


@pytest.mark.parametrize("died", ["1", "kill", "75"])
def test_tpu_worker_that_dies_restarts_all_on_the_same_slice(world, died):
  plan(world, f"run {died}, 0 0")
  result = world.run("tpu_vm.sh", "run")
  assert result.returncode == 0, result.stderr
  counted = "preemption 1 of 4" if died == "75" else "retry 1 of 3"
  assert counted in result.stderr
  assert len(world.starts()) == 2 * WORKERS
  assert world.slice_calls() == ["create", "delete"]
  signals = (world.fake / "worker0.signals").read_text()
  assert signals == "TERM\n"  # once: it may save


def test_tpu_worker_that_does_not_stop_is_killed(world):
  plan(world, "hang")
  process = world.start("tpu_vm.sh", "run", "--keep")
  world.wait_for("worker0.training")
  world.environment["AUNET_GRACE_SECONDS"] = "0.2"
  result = world.run("tpu_vm.sh", "stop")
  assert "worker worker0 dead" in result.stdout
  process.communicate(timeout=60)  # the launcher starts it again; it finishes
  assert process.returncode == 0


def test_tpu_preempted_slice_is_replaced(world):
  plan(world, "preempt 75, 0 0")
  result = world.run("tpu_vm.sh", "run")
  assert result.returncode == 0, result.stderr
  assert len(world.starts()) == 2 * WORKERS
  assert world.slice_calls() == ["create", "delete", "create", "delete"]


def test_tpu_slice_that_stands_in_for_one_made_before_is_kept(world):
  assert world.run("tpu_vm.sh", "create").returncode == 0
  plan(world, "preempt 75, 0 0")
  assert world.run("tpu_vm.sh", "run").returncode == 0
  assert world.slice_calls() == ["create", "delete", "create"]


def test_tpu_slice_that_someone_else_made_meanwhile_is_not_deleted(world):
  world.write("create.plan", "exists\n")
  assert world.run("tpu_vm.sh", "run").returncode == 0
  assert world.slice_calls() == ["create"]


def test_tpu_machine_that_shuts_down_lets_the_trainer_save_once(world):
  """Every process gets SIGTERM then, the one that notes the status too."""
  plan(world, "run")
  process = world.start("tpu_vm.sh", "run", "--keep")
  world.wait_for("worker0.training")
  process.kill()
  process.wait(timeout=30)
  run = "workers/0/aunet/run"
  os.killpg(int((world.fake / run / "pid").read_text()), signal.SIGTERM)
  world.wait_for(f"{run}/status")
  assert (world.fake / run / "status").read_text() == "75\n"
  assert (world.fake / "worker0.signals").read_text() == "TERM\n"


def test_tpu_half_of_the_workers_unreachable(world):
  """The slice is there, one worker never answers: it is replaced."""
  plan(world, "run run, 0 0")
  process = world.start("tpu_vm.sh", "run")
  for worker in range(WORKERS):
    world.wait_for(f"worker{worker}.training")
  world.write("unreachable", "1\n")
  _, errors = process.communicate(timeout=60)
  assert process.returncode == 0, errors
  assert errors.count("1 did not answer") == 5  # MAX_UNREACHABLE looks
  assert world.slice_calls() == ["create", "delete", "create", "delete"]


def test_tpu_workers_unreachable_for_a_while_go_on(world):
  plan(world, "run run")
  process = world.start("tpu_vm.sh", "run", "--keep")
  for worker in range(WORKERS):
    world.wait_for(f"worker{worker}.training")
  world.write("offline", "")
  for _ in range(10):  # twice as many looks as lose a worker
    read_until(process, "gcloud does not answer either")
  (world.fake / "offline").unlink()
  read_until(process, "2 of 2 workers train")
  assert world.slice_calls() == ["create"]  # nothing was deleted meanwhile
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=60)
  assert len(world.starts()) == WORKERS


def test_tpu_bad_input_is_not_tried_again(world):
  plan(world, "run 2")
  result = world.run("tpu_vm.sh", "run")
  assert result.returncode == 2
  assert len(world.starts()) == WORKERS
  assert world.slice_calls() == ["create", "delete"]


def test_tpu_gives_up_after_max_retries(world):
  world.job("MAX_RETRIES=1")
  plan(world, "1, 1, 1")
  result = world.run("tpu_vm.sh", "run")
  assert result.returncode == 1 and "giving up" in result.stderr
  assert len(world.starts()) == 2 * WORKERS
  assert not (world.fake / "state").exists()


@pytest.mark.parametrize("made_before", [False, True])
def test_tpu_run_interrupted_saves_then_deletes_what_it_made(
  world, made_before
):
  if made_before:
    assert world.run("tpu_vm.sh", "create").returncode == 0
  plan(world, "run run")
  result = world.interrupt("tpu_vm.sh", "run", after="worker1.training")
  assert result.returncode == 75, result.stderr
  for worker in range(WORKERS):
    assert (world.fake / f"worker{worker}.signals").read_text() == "TERM\n"
  assert (world.fake / "state").exists() == made_before


def test_tpu_run_finds_a_training_run_again(world):
  plan(world, "run run")
  assert world.run("tpu_vm.sh", "create").returncode == 0
  first = world.start("tpu_vm.sh", "run")
  for worker in range(WORKERS):
    world.wait_for(f"worker{worker}.training")
  first.kill()  # the laptop is closed
  first.communicate(timeout=30)
  status = world.run("tpu_vm.sh", "status")
  assert status.stdout.count("running") == WORKERS
  copies = len(world.calls("git"))
  again = world.start("tpu_vm.sh", "run")
  read_until(again, "2 of 2 workers train")
  again.send_signal(signal.SIGINT)
  again.communicate(timeout=60)
  assert again.returncode == 75
  assert len(world.starts()) == WORKERS
  assert len(world.calls("git")) == copies  # nor was its code replaced
  logs = world.run("tpu_vm.sh", "logs")
  for worker in range(WORKERS):
    assert f"[worker{worker}] " in logs.stdout
    assert "exit status 75" in logs.stdout


def test_tpu_budgets_start_again_with_every_new_checkpoint(world):
  """More failures than MAX_RETRIES, and a stop; each with a checkpoint."""
  world.job("MAX_RETRIES=1")
  plan(world, "1:1, 2:75, 3:1, 0")
  result = world.run("tpu_vm.sh", "run")
  assert result.returncode == 0, result.stderr
  assert len(world.starts()) == 4 * WORKERS
  assert "preemption 1 of 4" in result.stderr


def test_tpu_bad_input_beside_another_status_is_a_failure(world):
  """A process that met a passing fault ends the others with another status."""
  plan(world, "2 1, 0 0")
  result = world.run("tpu_vm.sh", "run")
  assert result.returncode == 0, result.stderr
  assert len(world.starts()) == 2 * WORKERS


def test_tpu_training_that_hangs_is_started_again(world):
  world.job("HANG_SECONDS=1")
  world.environment["AUNET_GRACE_SECONDS"] = "1"
  plan(world, "7:run run, 0 0")
  result = world.run("tpu_vm.sh", "run")
  assert result.returncode == 0, result.stderr
  assert "no new step for 1 s (the last one: 7)" in result.stderr
  assert len(world.starts()) == 2 * WORKERS


def test_tpu_worker_that_was_rebooted_mounts_again(world):
  """A reboot forgets mounts, not files: start mounts what setup mounted."""
  world.job("DATA_DISK=projects/p/zones/z/disks/d")
  world.write("mountpoint.plan", "1\n" * 99)
  plan(world, "1, 0")
  assert world.run("tpu_vm.sh", "run").returncode == 0
  # At the setup, at the start, and at the start after the failure.
  assert len(world.calls("gcsfuse")) == 3 * WORKERS
  assert sum("mount" in call for call in world.calls("sudo")) == 3 * WORKERS


def test_tpu_workers_get_the_environment_and_the_pinned_versions(world):
  assert world.run("tpu_vm.sh", "run").returncode == 0
  environment = (world.fake / "worker1.env").read_text()
  assert f"XLA_FLAGS={NASTY}\n" in environment
  assert f"JAX_COMPILATION_CACHE_DIR={world.workdir}/compiled\n" in environment
  installs = [call for call in world.calls("worker0") if "install" in call]
  assert any(
    call[-1].endswith("launch/requirements-tpu.txt") for call in installs
  )


def test_tpu_request_says_what_the_job_says(world):
  world.job(EVERY_REQUEST)
  lines = world.run("tpu_vm.sh", "run", "--dry-run").stdout.splitlines()
  (create,) = [line.split() for line in lines if " create " in line]
  assert {
    "--node-count=2",
    "--node-prefix=test",
    "--reserved",
    "--reservation-host-project=other",
    "--service-account=me@x.iam",
    "--network=net",
    "--subnetwork=sub",
    "--internal-ips",
    "--data-disk=source=projects/p/zones/z/disks/d,mode=read-only",
    "--valid-until-duration=6h",
  } <= set(create)
  assert not {"--spot", "--node-id=test"} & set(create)
  for line in lines:
    if " ssh " in line or " scp " in line:
      assert "--node=all --worker=all" in line
      assert "--tunnel-through-iap" in line


@pytest.mark.parametrize(
  "extra, words",
  [
    ("FLAGS+=(--config.data.train=s3://bucket/x.txt)", ["s3fs"]),
    ("BUCKET= FLAGS+=(--config.data.train=/mnt/bucket/x)", ["set BUCKET"]),
    ("WORKDIR=runs/x", ["lost with the slice"]),
    ("WORKDIR=gs://bucket/x", ["is a bucket", "--config.data.cache_dir=/tmp"]),
    ("FLAGS+=(--config.train.batch_size=12)", ["does not fit 8 devices"]),
    ("FLAGS+=(--config.trian.batch_size=8)", ["trian"]),
    ("HOSTS=3", ["HOSTS=3", "has 2 VMs"]),
    ("ACCELERATOR=tpu7x-16", ["tpu7x-16", "gke.sh"]),
  ],
)
def test_needs_are_checked_before_a_slice_is_asked_for(world, extra, words):
  world.job(extra)
  result = world.run("tpu_vm.sh", "run")
  assert result.returncode == 2
  for word in words:
    assert word in result.stderr
  assert not world.calls("gcloud")


def test_tpu_delete_that_does_not_work_is_loud(world):
  world.write("state", "ACTIVE\n")
  (world.bin / "gcloud").unlink()
  (world.bin / "gcloud").symlink_to(FAKES / "recorder")
  world.write("gcloud.stdout", "ACTIVE\n")
  result = world.run("tpu_vm.sh", "delete")
  assert result.returncode == 1
  assert "MAY COST MONEY" in result.stderr
  assert "queued-resources delete test" in result.stderr


def test_tpu_secrets_are_copied_as_a_private_file(world):
  secrets = world.path / "my secrets"
  secrets.write_text("HF_TOKEN=s3cret\n")
  secrets.chmod(0o600)
  world.job(f"SECRETS_FILE={shlex.quote(str(secrets))}")
  assert world.run("tpu_vm.sh", "create").returncode == 0
  result = world.run("tpu_vm.sh", "run")
  assert result.returncode == 0, result.stderr
  for worker in range(WORKERS):
    copy = world.fake / f"workers/{worker}/aunet/secrets.env"
    assert copy.stat().st_mode & 0o777 == 0o600
    assert (
      "HF_TOKEN=s3cret\n" in (world.fake / f"worker{worker}.env").read_text()
    )
    log = (world.fake / f"workers/{worker}/aunet/run/log").read_text()
    assert "s3cret" not in log
  everything = str(world.calls()) + str(world.starts())
  assert "s3cret" not in everything + result.stdout + result.stderr

"""local.sh, gpu_host.sh and slurm.sbatch, and what they do about failures."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch_world import LAUNCH, NASTY, ROOT

sys.path.append(str(LAUNCH))
import check_job  # noqa: E402


def test_local_runs_the_trainer_with_exact_arguments(world):
  world.write("trainer.plan", "3\n")
  result = world.run("local.sh", "--", "--config.seed=5")
  assert result.returncode == 3  # the trainer's status, and no retry
  assert world.starts() == [
    [
      "trainer",
      "-m",
      "aunet_jax.train",
      "--config=configs/quickstart.py",
      f"--workdir={world.workdir}",
      f"--config.train.sample_prompt={NASTY}",
      "--config.train.batch_size=96",
      "--config.seed=5",
    ]
  ]


def test_one_failed_process_ends_the_others(world):
  world.write("trainer.plan", "run\n1\n")
  assert world.run("local.sh", "--processes=2").returncode == 1
  assert (world.fake / "trainer.signals").read_text() == "TERM\n"
  identities = {start[-1] for start in world.starts()}
  assert identities == {"--process_id=0", "--process_id=1"}


@pytest.mark.parametrize("script", ["local.sh", "gpu_host.sh"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_once_and_ends_without_retry(world, script, number):
  world.write("trainer.plan", "run\n0\n")
  process = world.start(script)
  world.wait_for("trainer.training")
  process.send_signal(number)
  process.communicate(timeout=30)
  assert process.returncode == 75
  assert (world.fake / "trainer.signals").read_text() == "INT\n"
  assert len(world.starts()) == 1


@pytest.mark.parametrize(
  "plan, status, starts",
  [
    ("0", 0, 1),
    ("1 kill 75 0", 0, 4),  # crashes and stops that nobody here asked for
    ("2 0", 2, 1),  # bad input: not again
    ("130 0", 130, 1),  # the user left at once
    ("1 1 1 1 0", 1, 4),  # MAX_RETRIES=3
  ],
)
def test_gpu_host_retries(world, plan, status, starts):
  world.write("trainer.plan", plan.replace(" ", "\n"))
  result = world.run("gpu_host.sh")
  assert result.returncode == status, result.stderr
  assert len(world.starts()) == starts


@pytest.mark.parametrize(
  "plan, status, starts",
  [
    ("5:1 6:1 7:1 8:1 9:1 0", 0, 6),  # each with a checkpoint of its own
    ("75 75 75 75 0", 0, 5),  # MAX_PREEMPTIONS=4 of them, and no failure
    ("75 75 75 75 75 0", 75, 5),
    ("5:2 0", 0, 2),  # input that has trained was good
    ("2 0", 2, 1),
  ],
)
def test_gpu_host_budgets(world, plan, status, starts):
  world.write("trainer.plan", plan.replace(" ", "\n"))
  result = world.run("gpu_host.sh")
  assert result.returncode == status, result.stderr
  assert len(world.starts()) == starts


@pytest.mark.parametrize("word", ["run", "frozen"])
def test_gpu_host_ends_a_run_that_makes_no_step(world, word):
  world.job("HANG_SECONDS=1")
  world.write("trainer.plan", f"5:{word}\n0\n")
  result = world.run("gpu_host.sh")
  assert result.returncode == 0, result.stderr
  assert "no new step for 1 s (the last one: 5)" in result.stderr
  assert len(world.starts()) == 2


BUCKET_JOB = """WORKDIR=gs://bucket/runs/x
FLAGS+=(--config.data.cache_dir=/tmp/aunet_data)"""


@pytest.mark.parametrize(
  "plan, status, starts",
  [("5:1 6:1 7:1 8:1 9:1 0", 0, 6), ("5:2 0", 0, 2), ("1 1 1 1 0", 1, 4)],
)
def test_budgets_of_a_workdir_in_a_bucket(world, plan, status, starts):
  world.job(BUCKET_JOB)
  world.write("trainer.plan", plan.replace(" ", "\n"))
  result = world.run("gpu_host.sh")
  assert result.returncode == status, result.stderr
  assert len(world.starts()) == starts
  assert "--workdir=gs://bucket/runs/x" in world.starts()[0]
  home = world.path / ".local/state/aunet_jax/test"  # of the lock
  assert home.is_dir() and not (ROOT / "gs:").exists()


def test_a_bucket_that_does_not_answer_ends_no_run(world):
  world.job(BUCKET_JOB)
  world.write("bucket_down", "")
  world.write("trainer.plan", "run\n")
  result = world.interrupt("gpu_host.sh", after="trainer.training")
  assert result.returncode == 75, result.stderr


def test_gpu_host_goes_on_with_fewer_gpus(world):
  world.job("GPUS=8 FLAGS+=(--config.mesh.fsdp=8)")
  result = world.run("gpu_host.sh", "--gpus=2")
  assert result.returncode == 0, result.stderr
  (start,) = world.starts()
  assert start[-3:] == [
    "--config.mesh.data=1",
    "--config.mesh.fsdp=2",
    "--config.train.grad_accumulation=4",
  ]


def test_slurm_goes_on_with_fewer_nodes(world):
  world.job("GPUS=8 NODES=4 FLAGS+=(--config.mesh.fsdp=8)")
  result = world.run("slurm.sbatch", "--nodes=2", "--dry-run")
  assert result.returncode == 0, result.stderr
  submit, step = result.stdout.split("# in the allocation:")
  assert "--nodes=2" in submit
  assert "--config.mesh.data=2 --config.mesh.fsdp=8 " in step
  assert "--config.train.grad_accumulation=2 " in step
  assert "--num_processes=2" in step


@pytest.mark.parametrize(
  "mesh, batch, devices, slices, width, wanted",
  [
    # aunet2_1b on 64 chips, a slice of two lost: fsdp stays, rows of a chip too
    ((8, 8, 1, 1), 192, 32, 1, 512, (4, 8, 1, 2)),
    ((8, 8, 1, 1), 192, 128, 2, 512, None),  # 192 rows do not divide
    ((1, 8, 1, 4), 192, 6, 1, 768, (1, 6, 1, 8)),
    ((1, 8, 1, 4), 192, 6, 1, 512, (3, 2, 1, 8)),  # 6 does not divide 512
    ((4, 2, 2, 1), 64, 8, 2, 0, (2, 2, 2, 2)),
    ((1, 8, 1, 1), 8, 7, 1, 0, None),
  ],
)
def test_the_mesh_for_other_hardware(
  mesh, batch, devices, slices, width, wanted
):
  chosen = check_job.choose_mesh(
    check_job.Mesh(*mesh), batch, devices, slices, width
  )
  assert chosen == (None if wanted is None else check_job.Mesh(*wanted))


def test_a_number_of_devices_that_no_mesh_fits_names_the_next(world):
  world.job("GPUS=8 FLAGS+=(--config.mesh.fsdp=8)")
  result = world.run("gpu_host.sh", "--gpus=7")
  assert result.returncode == 2
  assert "smaller number that does is 6" in result.stderr


def test_gpu_host_refuses_missing_gpus_at_first_and_waits_for_lost_ones(world):
  world.job("GPUS=3")
  result = world.run("gpu_host.sh")
  assert result.returncode == 2 and "GPUS=3 but 2" in result.stderr
  world.job()
  world.environment["CUDA_VISIBLE_DEVICES"] = "1"
  result = world.run("gpu_host.sh")
  assert result.returncode == 2 and "GPUS=2 but 1" in result.stderr
  del world.environment["CUDA_VISIBLE_DEVICES"]
  # Seen at the check before, gone at the first try, back at the second.
  world.write("nvidia-smi.plan", "0\n9\n0\n")
  assert world.run("gpu_host.sh").returncode == 0
  assert len(world.calls("nvidia-smi")) == 5


def test_processes_that_save_are_left_to_save(world):
  """Ctrl-C reaches each once; the first to end does not signal the others."""
  world.write("trainer.plan", "run\nrun\nrun\n")
  process = world.start("local.sh", "--processes=3")
  world.wait_for("trainer.training", lines=3)
  process.send_signal(signal.SIGINT)
  process.communicate(timeout=30)
  assert process.returncode == 75
  assert (world.fake / "trainer.signals").read_text() == "TERM\n" * 3


def test_a_workdir_has_one_launcher(world):
  world.write("trainer.plan", "run\n")
  first = world.start("gpu_host.sh")
  world.wait_for("trainer.training")
  second = world.run("local.sh")
  assert second.returncode == 2 and "another launcher" in second.stderr
  first.kill()  # the trainer lives on, so the workdir stays taken
  first.wait(timeout=30)
  end = time.monotonic() + 30
  with pytest.raises(ProcessLookupError):  # nothing goes on watching it
    while time.monotonic() < end:
      os.killpg(first.pid, 0)
      time.sleep(0.05)
  assert world.run("local.sh").returncode == 2
  assert len(world.starts()) == 1


def test_slurm_cancels_the_step_that_hangs(world):
  world.job("HANG_SECONDS=1")
  world.environment["SLURM_JOB_ID"] = "17"
  (world.bin / "srun").unlink()
  (world.bin / "srun").write_text(
    "#!/bin/bash\n[[ -e $FAKE/second ]] && exit 0\n"
    'touch "$FAKE/second"\n'
    "until [[ -e $FAKE/scancel.env ]]; do sleep 0.02; done\nexit 137\n"
  )
  (world.bin / "srun").chmod(0o755)
  result = subprocess.run(
    [LAUNCH / "slurm.sbatch", f"--job={world.path / 'my job.env'}"],
    env=world.environment,
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr
  assert world.calls("scancel") == [["scancel", "17.0"]]


def test_slurm_submits_itself(world):
  assert world.run("slurm.sbatch").returncode == 0
  (call,) = world.calls("sbatch")
  assert f"--chdir={ROOT}" in call and "--nodes=3" in call
  assert f"--output={world.workdir}/slurm-%j.log" in call
  assert call[-2:] == [
    str(LAUNCH / "slurm.sbatch"),
    f"--job={world.path / 'my job.env'}",
  ]
  assert world.workdir.is_dir()  # SLURM does not make it
  options = re.findall("^#SBATCH (.*)", Path(call[-2]).read_text(), re.M)
  assert "--mem=0" in " ".join(options).split()  # all memory of a node
  world.job(BUCKET_JOB)
  assert world.run("slurm.sbatch").returncode == 0
  logs = world.path / ".local/state/aunet_jax/test"
  assert f"--output={logs}/slurm-%j.log" in world.calls("sbatch")[-1]
  assert logs.is_dir()
  assert not world.calls("srun")


@pytest.mark.parametrize(
  "plan, status, steps, requeued",
  [
    ("0", 0, 1, False),
    ("1 137 0", 0, 3, False),  # a dead worker: all again, same allocation
    ("75 0", 75, 1, True),  # time limit or preemption
    ("2", 2, 1, False),
    ("1 1 1 1 0", 1, 4, False),
  ],
)
def test_slurm_allocation(world, plan, status, steps, requeued):
  world.environment["SLURM_JOB_ID"] = "17"
  world.write("srun.plan", plan.replace(" ", "\n"))
  spooled = world.path / "slurm_script"  # SLURM runs a copy
  shutil.copy(LAUNCH / "slurm.sbatch", spooled)
  result = subprocess.run(
    [spooled, f"--job={world.path / 'my job.env'}"],
    env=world.environment,
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert result.returncode == status, result.stderr
  calls = world.calls("srun")
  assert len(calls) == steps and calls[0] == calls[-1]
  assert f"--config.train.sample_prompt={NASTY}" in calls[0]
  assert {"--mem=0", "--multihost", "--num_processes=3"} <= set(calls[0])
  environment = (world.fake / "srun.env").read_text()
  assert "JAX_LOCAL_DEVICE_IDS=0,1\n" in environment
  wanted = [["scontrol", "requeue", "17"]] if requeued else []
  assert world.calls("scontrol") == wanted

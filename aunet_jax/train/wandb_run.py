"""The rows of a run, sent to Weights & Biases as well (`train.wandb`).

Optional: `pip install 'aunet_jax[wandb]'`. WANDB_MODE=offline keeps the rows in
the workdir, for `wandb sync`; whatever else its library takes from the
environment works.
"""

import json
import math
import tempfile
import uuid
from pathlib import Path

from aunet_jax.config import Config
from aunet_jax.workdir.buckets import BucketPath

ID_FILE = "wandb_id"  # of the run there; a start that goes on logs to it


def check(config: Config) -> None:
  """Raises: ValueError where the library is wanted and missing."""
  if config.train.wandb is None:
    return
  try:
    import wandb  # noqa: F401
  except ImportError as error:
    raise ValueError(
      f"train.wandb={config.train.wandb!r} needs Weights & Biases ({error}): "
      f"pip install 'aunet_jax[wandb]', or pip install wandb."
    ) from None


class WandbRun:
  """One run of a project, the same for every start in a workdir."""

  def __init__(self, workdir: Path | BucketPath, config: Config):
    """Raises: ValueError where the library will not begin."""
    import wandb

    path = workdir / ID_FILE
    if not path.exists():
      path.write_bytes(uuid.uuid4().hex[:12].encode())
    folder = workdir
    if isinstance(workdir, BucketPath):
      folder = tempfile.mkdtemp(prefix="aunet_jax_wandb_")
    try:
      self._run = wandb.init(
        project=config.train.wandb,
        name=workdir.name,
        id=path.read_bytes().decode(),
        resume="allow",
        dir=str(folder),
        config=json.loads(config.to_json()),
        settings=wandb.Settings(console="off"),
      )
    except wandb.Error as error:
      raise ValueError(
        f"train.wandb={config.train.wandb!r}: Weights & Biases does not begin: "
        f"{' '.join(str(error).split())} (`wandb login` logs in; "
        f"WANDB_MODE=offline needs no login)"
      ) from None
    # Steps that run again after a kill are logged again, at their own place.
    self._run.define_metric("step")
    self._run.define_metric("*", step_metric="step")

  def row(self, row: dict) -> None:
    numbers = {
      name: value
      for name, value in row.items()
      if isinstance(value, int | float) and math.isfinite(value)
    }
    for i, fill in enumerate(row.get("fill", ())):
      numbers[f"fill/stage_{i + 1}"] = fill
    self._run.log(numbers)

  def close(self) -> None:
    self._run.finish()

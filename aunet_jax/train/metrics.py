"""What a run tells: progress line, metrics.jsonl, TensorBoard, loss curve.

And Weights & Biases, where it is asked for.
"""

import contextlib
import io
import json
import math
import statistics
import sys
from pathlib import Path

from aunet_jax.aunet import loss
from aunet_jax.config import Config
from aunet_jax.terminal import duration, si
from aunet_jax.train import optimizer
from aunet_jax.train.wandb_run import WandbRun
from aunet_jax.workdir import buckets
from aunet_jax.workdir.buckets import BucketPath
from aunet_jax.workdir.layout import (
  METRICS_FILE,
  column,
  drop_rows_after,
  read_rows,
)

CURVE_FILE = "loss_curve.png"


SPIKE_STEPS = 100  # steps a loss is compared with


class Log:
  """metrics.jsonl, TensorBoard and the progress line of process 0.

  In a bucket both are put anew now and then, and by `put`.
  """

  def __init__(
    self,
    workdir: Path | BucketPath,
    config: Config,
    step: int,
    active: bool,
  ):
    self._config, self._active = config, active
    self._live = active and sys.stdout.isatty()
    self._path = workdir / METRICS_FILE
    self._board = self._wandb = None
    if active:
      drop_rows_after(self._path, step)
      self._rows = buckets.Grown(self._path)
      if config.train.tensorboard:
        from tensorboardX import SummaryWriter  # half a second to import

        self._events = buckets.Mirror(workdir / "tensorboard")
        self._board = SummaryWriter(str(self._events.here), purge_step=step + 1)
      if config.train.wandb is not None:
        self._wandb = WandbRun(workdir, config)

  def say(self, line: str) -> None:
    """A line that stays."""
    if self._active:
      print(("\r\033[K" if self._live else "") + line, flush=True)

  def progress(self, row: dict, eta_seconds: float) -> None:
    bits = row["bits_per_byte"]
    line = (
      f"step {row['step']}/{self._config.train.num_steps}"
      f"  {'not finite' if bits is None else f'{bits:.3f} bits/byte'}"
      f"  {si(row['bytes_per_second'])}B/s"
      f"  fill {' '.join(f'{100 * f:.0f}%' for f in row['fill'])}"
    )
    if row["useful_mfu"] is not None:
      line += f"  MFU {100 * row['useful_mfu']:.1f}%"
    line += f"  ETA {duration(eta_seconds)}"
    if self._live:
      print("\r\033[K" + line, end="", flush=True)
    else:
      self.say(line)

  def row(self, row: dict) -> None:
    """Appends one object to metrics.jsonl and TensorBoard.

    Raises: OSError, with the file's name, where it cannot be written.
    """
    if not self._active:
      return
    try:
      self._rows.add(json.dumps(row) + "\n")
    except OSError as error:  # a full disk names no file
      raise OSError(error.errno, error.strerror, str(self._path)) from error
    if self._board is not None:
      for name, value in row.items():
        if name != "step" and isinstance(value, int | float):
          self._board.add_scalar(name, value, row["step"])
      for i, fill in enumerate(row.get("fill", ())):
        self._board.add_scalar(f"fill/stage_{i + 1}", fill, row["step"])
    if self._wandb is not None:
      self._wandb.row(row)

  def put(self) -> None:
    """What was logged up to now is in the workdir, which may be a bucket.

    Raises: BucketError.
    """
    if self._active:
      self._rows.put()
      if self._board is not None:
        self._board.flush()
        self._events.put()

  def rewind(self, step: int) -> None:
    """Takes back the rows after `step`, which will be run again."""
    if self._active:
      self.put()
      drop_rows_after(self._path, step)
      self._rows = buckets.Grown(self._path)

  def close(self) -> None:
    """Whatever happened before: what can be kept is kept."""
    if self._board is not None:
      self._board.close()
    if self._wandb is not None:
      self._wandb.close()
    with contextlib.suppress(buckets.BucketError):
      self.put()


def draw_loss_curve(workdir: Path | BucketPath) -> Path | BucketPath:
  """Bits per byte against bytes seen, training and held-out, as a PNG."""
  from matplotlib.figure import Figure  # half a second to import

  rows = read_rows(workdir / METRICS_FILE)
  figure = Figure(figsize=(7, 4.5), layout="constrained")
  axes = figure.subplots()
  for name, label, style in (
    ("bits_per_byte", "training", {"color": "#0072b2", "linewidth": 1}),
    ("heldout_bits_per_byte", "held out", {"color": "#d55e00", "marker": "o"}),
  ):
    points = [(seen / 1e6, y) for seen, y in column(rows, "bytes_seen", name)]
    if points:
      axes.plot(*zip(*points, strict=True), label=label, **style)
  axes.set_xlabel("text seen (MB)")
  axes.set_ylabel("bits per byte")
  axes.grid(alpha=0.3)
  axes.legend()
  path = workdir / CURVE_FILE
  drawn = io.BytesIO()
  figure.savefig(drawn, dpi=150)
  path.write_bytes(drawn.getvalue())
  return path


def rate_of_step(config: Config, step: int, metrics: dict) -> float:
  """The learning rate that a step used.

  The schedule counts updates: a skipped step leaves it where it is, as it
  leaves all of the optimizer.
  """
  skipped_before = int(metrics["nonfinite_total"])
  if metrics["nonfinite_in_row"]:
    skipped_before -= 1  # this step itself
  schedule = optimizer.learning_rate_schedule(
    config.optimizer, config.train.num_steps
  )
  return float(schedule(step - 1 - skipped_before))


class Interval:
  """Sums since the last logged step, and totals since the first.

  Kept in checkpoints, so that a resumed run logs the numbers an uninterrupted
  one would.
  """

  def __init__(self, saved: dict | None = None):
    self.restore(saved or {})

  def restore(self, saved: dict) -> None:
    """Takes the values of an earlier `to_json`."""
    self.bytes_seen = saved.get("bytes_seen", 0)
    self.nats = saved.get("nats", 0.0)
    self.level_nats = saved.get("level_nats", 0.0)
    self.ahead_nats = saved.get("ahead_nats", [])  # of heads after the first
    self.targets = saved.get("targets", 0.0)
    self.bytes = saved.get("bytes", 0)
    self.positions = saved.get("positions")
    self.steps = saved.get("steps", 0)
    self.recent = saved.get("recent", [])  # bits per byte of the last steps

  def to_json(self) -> dict:
    return dict(vars(self))

  def add(self, metrics: dict) -> None:
    positions = [int(n) for n in metrics["positions"]]
    self.steps += 1
    self.bytes_seen += int(metrics["bytes"])
    self.positions = (
      positions
      if self.positions is None
      else [a + b for a, b in zip(self.positions, positions, strict=True)]
    )
    if math.isfinite(metrics["nats"]):  # a skipped step has no loss to average
      self.nats += float(metrics["nats"])
      self.level_nats += float(metrics["level_nats"])
      before = self.ahead_nats or [0.0] * len(metrics["ahead_nats"])
      self.ahead_nats = [
        a + (float(b) if math.isfinite(b) else 0.0)
        for a, b in zip(before, metrics["ahead_nats"], strict=True)
      ]
      self.targets += float(metrics["targets"])
      self.bytes += int(metrics["bytes"])

  def spike(self, step: int, metrics: dict, sigmas: float) -> dict | None:
    """A row about this step if its loss stands out from those before it.

    Out means more than `sigmas` standard deviations above the mean, both of
    the SPIKE_STEPS steps before; the first ones of a run are only looked at.
    """
    if not math.isfinite(metrics["nats"]) or not metrics["bytes"]:
      return None
    bits = loss.bits_per_byte(float(metrics["nats"]), int(metrics["bytes"]))
    before = self.recent
    self.recent = [*before, bits][-SPIKE_STEPS:]
    if len(before) < SPIKE_STEPS:
      return None
    mean, deviation = statistics.fmean(before), statistics.pstdev(before)
    if bits <= mean + sigmas * deviation:
      return None
    return {
      "step": step,
      "spike_bits_per_byte": bits,
      "usual_bits_per_byte": mean,
      "usual_deviation": deviation,
      "spike_grad_norm": float(metrics["grad_norm"]),
    }

  def row(self, config: Config, step: int, metrics: dict) -> dict:
    """The logged numbers that depend on nothing but data and seed."""
    rows = config.train.batch_size * self.steps
    more = {}
    if config.model.level_loss_weight > 0:
      more["level_loss_nats"] = (
        self.level_nats / self.targets if self.targets else None
      )
    for k in range(2, config.model.heads + 1):  # of the byte k ahead
      more[f"ahead_{k}_loss_nats"] = (
        self.ahead_nats[k - 2] / self.targets if self.targets else None
      )
    return {
      "step": step,
      # None (null) where no step of the interval had a finite loss.
      "loss_nats": self.nats / self.targets if self.targets else None,
      "bits_per_byte": (
        loss.bits_per_byte(self.nats, self.bytes) if self.bytes else None
      ),
      **more,
      "bytes_seen": self.bytes_seen,
      "learning_rate": rate_of_step(config, step, metrics),
      "grad_norm": (
        float(metrics["grad_norm"])
        if math.isfinite(metrics["grad_norm"])
        else None
      ),
      "nonfinite_total": int(metrics["nonfinite_total"]),
      "fill": [
        count / (rows * capacity)
        for count, capacity in zip(
          self.positions, config.model.capacities, strict=True
        )
      ],
    }

  def reset(self) -> None:
    self.nats = self.level_nats = self.targets = 0.0
    self.ahead_nats = []
    self.bytes = self.steps = 0
    self.positions = None

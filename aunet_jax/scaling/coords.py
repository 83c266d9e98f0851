"""The coordinate check: do activations keep their size as stages get wider?

Models of growing width train for a few steps at one learning rate, always on
the same batch. After each step the mean |x| of what every part gives is
measured, and how far it has moved since step 0, mean |x - x_0| (muP, arXiv
2203.03466, Appendix D.1). With a scaling by width that is right, both are as
flat over widths as chance allows; without it they grow.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from aunet_jax import config as config_lib
from aunet_jax.aunet import AUNet, sharding
from aunet_jax.aunet.block import Stack, SwiGLU
from aunet_jax.aunet.network import init_params
from aunet_jax.aunet.self_attention import SelfAttention
from aunet_jax.config import Config, ModelConfig
from aunet_jax.data import packing, sources
from aunet_jax.files import write_whole
from aunet_jax.scaling import draw
from aunet_jax.splitting.splitter import Splitter
from aunet_jax.train import optimizer
from aunet_jax.train.state import TrainState
from aunet_jax.train.step import make_train_step

_LAYERS = {SelfAttention.NAME: "attention", "ffn": "feed-forward"}
CASES = {"without": "without base_dim", "with": "with base_dim"}


def small() -> Config:
  """What is checked unless a config is given: two stages, short rows."""
  c = config_lib.default(
    stages=[
      config_lib.stage(
        dim=64, num_layers=1, head_dim=32, window=64, capacity=128
      ),
      config_lib.stage(
        dim=64,
        num_layers=2,
        head_dim=32,
        window=None,
        capacity=40,
        rule="word@1",
      ),
    ]
  )
  c.model.dtype = "float32"
  c.train.batch_size = 8
  c.optimizer.learning_rate = 4e-3
  c.optimizer.clip_norm = 1.0
  return config_lib.from_config_dict(c)


def widened(model: ModelConfig, width: int, base: int | None) -> ModelConfig:
  """The model with a byte stage so wide, all stages in proportion.

  Heads keep their width, feed-forwards their proportion to their stage.

  Args: base: width of the byte stage in the base model; None = no scaling.
  Raises: ValueError for a width that is no whole number of heads.
  """
  first = model.stages[0].dim
  stages = []
  for number, stage in enumerate(model.stages, start=1):
    dims = [stage.dim * w / first for w in (width, base or first)]
    for dim in dims:
      if dim % stage.head_dim:
        raise ValueError(
          f"a byte stage of {width if dim is dims[0] else base} makes stage "
          f"{number} {dim:g} wide, which is no whole number of heads of "
          f"{stage.head_dim}; use multiples of the config's {first}."
        )
    new = dataclasses.replace(
      stage,
      dim=int(dims[0]),
      ffn_dim=round(stage.ffn * width / first),
      num_kv_heads=stage.num_kv_heads
      and round(stage.num_kv_heads * width / first),
      base_dim=None if base is None else int(dims[1]),
    )
    stages.append(new)
  return dataclasses.replace(model, stages=tuple(stages))


def _paths(train) -> str | list[str]:
  """Of `data.train`, whatever the weights."""
  if isinstance(train, str):
    return train
  found = [item["path"] if isinstance(item, dict) else item for item in train]
  lists = [[path] if isinstance(path, str) else path for path in found]
  return [path for some in lists for path in some]


def first_batch(config: Config) -> dict[str, np.ndarray]:
  """A batch of the config's text.

  Raises: ValueError where there is too little of it.
  """
  model, rows, data = config.model, config.train.batch_size, config.data
  texts = sources.sample(
    _paths(data.train),
    data.text_field,
    4 * rows * model.capacities[0],
    lambda skip: None,
    data.separator,
  )
  packed = packing.pack_documents(
    texts, Splitter(model.rules), model.capacities
  )
  if len(packed) < rows:
    raise ValueError(
      f"train.batch_size={rows} rows need more text than the "
      f"{sum(map(len, texts)):,} bytes of data.train={data.train!r}; use fewer "
      f"rows or other text."
    )
  return {
    name: np.stack([row[name] for row in packed[:rows]]) for name in packed[0]
  }


# ----- one model ------------------------------------------------------------


def activations(params: dict, model: ModelConfig, batch: dict) -> dict:
  """What every part gives, by its name, float32 (…, L, width of it).

  Parts: the output of every stack, of its attentions and feed-forwards, layers
  in front, and the logits.
  """
  kinds = (Stack, SelfAttention, SwiGLU)
  logits, caught = AUNet(model).apply(
    {"params": params},
    batch["bytes"],
    batch["levels"],
    batch["documents"],
    capture_intermediates=lambda module, _: isinstance(module, kinds),
    mutable=["intermediates"],
  )
  found = {}
  for path, x in jax.tree_util.tree_leaves_with_path(caught["intermediates"]):
    names = [getattr(key, "key", None) for key in path]
    layer = [_LAYERS[name] for name in names if name in _LAYERS]
    found[" ".join([names[0], *layer])] = x.astype(jnp.float32)
  return found | {"logits": logits}


def measure(
  config: Config, batch: dict, num_seeds: int
) -> dict[str, np.ndarray]:
  """Sizes of a model's activations of a batch while it learns that batch.

  Returns: by part, (steps + 1, 2): mean |x| and mean |x - x_0|, over seeds.
  """
  model, tx = config.model, optimizer.make_optimizer(config)

  @jax.jit
  def begin(key):
    params, zero = sharding.unbox(init_params(model, key)), jnp.int32(0)
    return TrainState(zero, params, tx.init(params), zero, zero)

  @jax.jit
  def look(params):
    return activations(params, model, batch)

  @jax.jit
  def sizes(now, first):
    return jax.tree.map(
      lambda x, y: jnp.stack([jnp.abs(x).mean(), jnp.abs(x - y).mean()]),
      now,
      first,
    )

  found = []
  mesh = sharding.make_mesh(config_lib.MeshConfig(), jax.devices()[:1])
  with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
    step = jax.jit(make_train_step(config, tx), donate_argnums=0)
    for seed in range(num_seeds):
      train_state = begin(jax.random.key(seed))
      first = look(train_state.params)
      rows = [sizes(first, first)]
      for _ in range(config.train.num_steps):
        train_state, _ = step(train_state, batch)
        rows.append(sizes(look(train_state.params), first))
      found.append(jax.device_get(rows))
  return {
    part: np.mean([[row[part] for row in rows] for rows in found], axis=0)
    for part in found[0][0]
  }


# ----- over widths ----------------------------------------------------------


class Check(NamedTuple):
  """`sizes[case][part]`: (widths, steps + 1, 2), the mean over seeds."""

  widths: tuple[int, ...]
  seeds: int
  config: Config
  sizes: dict[str, dict[str, np.ndarray]]

  def last(self, case: str, part: str, column: int) -> np.ndarray:
    """After the last step, by width. column: 0 size, 1 change."""
    return self.sizes[case][part][:, -1, column]


def spread(values: np.ndarray) -> float:
  """How much the largest is above the smallest, as a share of it."""
  low = float(np.min(values))
  return float(np.max(values)) / low - 1 if low > 0 else float("inf")


def cases(
  config: Config, widths: Sequence[int], base: int
) -> Iterator[tuple[str, Config]]:
  """Every config that is trained, and whether with scaling or without."""
  for case in CASES:
    for width in widths:
      scaled = base if case == "with" else None
      model = widened(config.model, width, scaled)
      yield case, dataclasses.replace(config, model=model)


def check(
  config: Config,
  widths: Sequence[int],
  num_steps: int,
  num_seeds: int,
  say: Callable[[str], None] = lambda line: None,
) -> Check:
  """Trains every width, with and without scaling from the narrowest on.

  The learning rate is at its peak from the first step on.

  Raises: ValueError for widths that do not fit the config, or too little text.
  """
  config = config_lib.override(
    config,
    [
      "optimizer.schedule=constant",
      "optimizer.decay_steps=None",
      "optimizer.warmup_steps=0",
      f"train.num_steps={num_steps}",
    ],
  )
  planned = list(cases(config, widths, min(widths)))
  batch = first_batch(config)
  sizes = {}
  for number, (case, one) in enumerate(planned, start=1):
    for part, x in measure(one, batch, num_seeds).items():
      sizes.setdefault(case, {}).setdefault(part, []).append(x)
    say(f"{number}/{len(planned)}: {one.model.stages[0].dim} {CASES[case]}")
  return Check(
    tuple(widths),
    num_seeds,
    config,
    {
      case: {part: np.stack(rows) for part, rows in parts.items()}
      for case, parts in sizes.items()
    },
  )


# ----- shown ----------------------------------------------------------------


def show(result: Check) -> str:
  """A line a part and case: sizes by width after the last step, and spread."""
  width = max(len(part) for part in result.sizes["with"])
  heads = "".join(f"{w:>9}" for w in result.widths)
  lines = []
  for column, what in enumerate(("mean |x|", "mean |x - x_0|")):
    for case, about in CASES.items():
      lines.append(f"{what}, {about}")
      lines.append(f"{'':{width}}{heads}   spread")
      for part in result.sizes[case]:
        values = result.last(case, part, column)
        numbers = "".join(f"{value:9.4f}" for value in values)
        lines.append(f"{part:{width}}{numbers}  {spread(values):6.1%}")
      lines.append("")
  for case, about in CASES.items():
    worst = [
      max(spread(result.last(case, p, i)) for p in result.sizes[case])
      for i in (0, 1)
    ]
    lines.append(
      f"{about}: sizes differ by at most {worst[0]:.0%}, changes by at most "
      f"{worst[1]:.0%}"
    )
  return "\n".join(lines)


def as_json(result: Check) -> str:
  settings = result.config.optimizer
  values = {
    "widths": result.widths,
    "steps": result.config.train.num_steps,
    "seeds": result.seeds,
    "batch_size": result.config.train.batch_size,
    "capacities": result.config.model.capacities,
    "optimizer": settings.name,
    "learning_rate": settings.learning_rate,
    "parts": {
      case: {
        part: {
          "size": x[:, :, 0].tolist(),
          "change": x[:, :, 1].tolist(),
          "size_spread": spread(x[:, -1, 0]),
          "change_spread": spread(x[:, -1, 1]),
        }
        for part, x in parts.items()
      }
      for case, parts in result.sizes.items()
    },
  }
  return json.dumps(values)


def charts(result: Check) -> list[draw.Chart]:
  """Sizes and changes, without and with scaling."""
  made = []
  steps = result.config.train.num_steps
  for column, what in enumerate(("mean |x|", "mean |x − x₀|")):
    for case, about in CASES.items():
      series = []
      for style, part in enumerate(result.sizes[case]):
        y = result.last(case, part, column)
        for kind in ("line", "points"):
          series.append(
            draw.Series(part, result.widths, y, style=style, kind=kind)
          )
      made.append(
        draw.Chart(
          name=f"{case}-{column}",
          title=f"{what}, {about}",
          caption="",
          x_label=f"width of the byte stage, after {steps} steps {about}",
          y_label=what,
          series=series,
          x_ticks=[(width, str(width)) for width in result.widths],
        )
      )
  return made


def write(result: Check, path: Path) -> None:
  write_whole(path, draw.sheet(charts(result)))

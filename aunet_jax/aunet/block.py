"""The Transformer block: a mixer and SwiGLU, each after an RMSNorm.

As the official code's block (arXiv 2506.14761 Section 2 builds on lingua's):
pre-norm, no biases, no norm after the last block of a stack. Of every part,
`__call__` computes a row at once and `step` one position of each row.

Letters: B batch, L positions, C rows of a block of the batch, D width, F
feed-forward.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from aunet_jax.aunet import sharding
from aunet_jax.aunet.cache import HISTORY, Write
from aunet_jax.aunet.convolution import ConvolvedAttention
from aunet_jax.aunet.layers import SAVED, kernel, norm_of, project, rms_norm
from aunet_jax.aunet.quantize import matmul
from aunet_jax.aunet.segments import piece_positions
from aunet_jax.aunet.self_attention import SelfAttention
from aunet_jax.config import ModelConfig, StageConfig


def mixer_of(stage: StageConfig):
  """The class that lets a stage's positions see each other."""
  return ConvolvedAttention if stage.conv else SelfAttention


def _gated(gate_BLF: jax.Array, up_BLF: jax.Array) -> jax.Array:
  hidden_BLF = nn.silu(gate_BLF) * up_BLF
  return nn.with_logical_constraint(hidden_BLF, ("batch", "length", "mlp"))


@jax.custom_vjp
def _gated_down(gate_BLF, up_BLF, down_FD) -> jax.Array:
  """(silu(gate) * up) W_down.

  The backward pass reads gate and up once, for all it makes of them. Left to
  itself, XLA computes the same again inside each of the products that follow.
  """
  return project(_gated(gate_BLF, up_BLF), down_FD)


def _gated_down_forward(gate_BLF, up_BLF, down_FD):
  return _gated_down(gate_BLF, up_BLF, down_FD), (gate_BLF, up_BLF, down_FD)


def _gated_down_backward(kept, dy_BLD):
  gate_BLF, up_BLF, down_FD = kept
  hidden_BLF, of_gated = jax.vjp(_gated, gate_BLF, up_BLF)
  (dhidden_BLF,) = jax.vjp(lambda h: project(h, down_FD), hidden_BLF)[1](dy_BLD)
  hidden_BLF, dgate_BLF, dup_BLF = jax.lax.optimization_barrier(
    (hidden_BLF, *of_gated(dhidden_BLF))
  )
  (ddown_FD,) = jax.vjp(lambda w: project(hidden_BLF, w), down_FD)[1](dy_BLD)
  return dgate_BLF, dup_BLF, ddown_FD


_gated_down.defvjp(_gated_down_forward, _gated_down_backward)


class SwiGLU(nn.Module):
  """(silu(x W_gate) * x W_up) W_down."""

  CONTRACTED = {"gate": (0,), "up": (0,), "down": (0,)}

  stage: StageConfig
  model: ModelConfig

  @nn.compact
  def __call__(self, x_BLD):
    D, F = self.stage.dim, self.stage.ffn
    gate_DF = kernel(self, "gate", D, (D, F), ("embed", "mlp"))
    up_DF = kernel(self, "up", D, (D, F), ("embed", "mlp"))
    down_FD = kernel(self, "down", F, (F, D), ("mlp", "embed"))
    gate_BLF = project(x_BLD, gate_DF)
    up_BLF = project(x_BLD, up_DF)
    return _gated_down(gate_BLF, up_BLF, down_FD)

  @staticmethod
  def weights(params: dict, matrix) -> dict:
    """Gate and up column by column, so that one product gives both."""
    gate_up_DF2 = jnp.stack([params["gate"], params["up"]], axis=-1)
    return {
      "gate_up": matrix(gate_up_DF2.reshape(gate_up_DF2.shape[0], -1)),
      "down": matrix(params["down"]),
    }

  @staticmethod
  def step(weights, x_CD):
    gate_up_CF2 = matmul(x_CD, weights["gate_up"])
    gate_up_CF2 = gate_up_CF2.reshape(x_CD.shape[0], -1, 2)
    h_CF = nn.silu(gate_up_CF2[..., 0]) * gate_up_CF2[..., 1]
    return matmul(h_CF, weights["down"])

  @staticmethod
  def num_weights(stage: StageConfig) -> int:
    return 3 * stage.dim * stage.ffn


class Block(nn.Module):
  """x + mixer(norm(x)), then x + swiglu(norm(x))."""

  stage: StageConfig
  model: ModelConfig

  @nn.compact
  def __call__(self, x_BLD, tables, documents_BL):
    norm, mixer = norm_of(self.model), mixer_of(self.stage)
    mix = mixer(self.stage, self.model, name=mixer.NAME)
    feed_forward = SwiGLU(self.stage, self.model, name="ffn")
    h_BLD = norm(name=f"{mixer.NAME}_norm")(x_BLD)
    x_BLD += mix(h_BLD, tables, documents_BL)
    x_BLD += feed_forward(norm(name="ffn_norm")(x_BLD))
    x_BLD = nn.with_logical_constraint(x_BLD, ("batch", "length", "activation"))
    return x_BLD, None

  @staticmethod
  def weights(params: dict, stage: StageConfig, matrix) -> dict:
    mixer = mixer_of(stage)
    return {
      "mixer_norm": params[f"{mixer.NAME}_norm"]["scale"],
      "mixer": mixer.weights(params[mixer.NAME], matrix),
      "ffn_norm": params["ffn_norm"]["scale"],
      "ffn": SwiGLU.weights(params["ffn"], matrix),
    }

  @staticmethod
  def step(
    weights, stage, model, cache, x_CD, tables, position_C, rows_C, ahead=1
  ):
    """Returns: x_CD, and the entry that the cache gets."""
    mixer = mixer_of(stage)
    with jax.named_scope(f"{mixer.NAME}_norm"):
      h_CD = rms_norm(x_CD, weights["mixer_norm"], model.norm_eps)
    with jax.named_scope(mixer.NAME):
      y_CD, entry = mixer.step(
        weights["mixer"], stage, cache, h_CD, tables, position_C, rows_C, ahead
      )
    x_CD += y_CD
    with jax.named_scope("ffn_norm"):
      h_CD = rms_norm(x_CD, weights["ffn_norm"], model.norm_eps)
    with jax.named_scope("ffn"):
      return x_CD + SwiGLU.step(weights["ffn"], h_CD), entry

  @staticmethod
  def num_parameters(stage: StageConfig) -> dict[str, int]:
    mixer = mixer_of(stage)
    small = mixer.num_small(stage)
    return {
      mixer.NAME: mixer.num_weights(stage),
      "ffn": SwiGLU.num_weights(stage),
      **small,
      "norms": 2 * stage.dim + small["norms"],
    }

  @staticmethod
  def saved_bytes(stage: StageConfig, itemsize: int) -> int:
    """Rough bytes of one row that the backward pass needs."""
    D, F = stage.dim, stage.ffn
    numbers = {"none": 4 * D + 4 * F, "dots": 2 * D + 2 * F, "full": D}
    size = stage.capacity * numbers[stage.remat] * itemsize
    return size + mixer_of(stage).saved_bytes(stage, itemsize)


_REMAT_POLICIES = {
  "dots": jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(SAVED),
  ),
  "full": jax.checkpoint_policies.nothing_saveable,
}


class Stack(nn.Module):
  """The blocks of one path of one stage, their parameters stacked."""

  stage: StageConfig
  model: ModelConfig

  @nn.compact
  def __call__(self, x_BLD: jax.Array, documents_BL: jax.Array) -> jax.Array:
    tables = mixer_of(self.stage).tables(
      self.stage, self.model, piece_positions(documents_BL)
    )
    block, num_layers = Block, self.stage.num_layers
    unroll = self.model.unroll_layers
    if unroll is None:
      # A loop copies what it keeps for the backward pass into arrays of all
      # layers, and out again: 7 to 19% of a step by estimates for TPUs and GPUs
      # (docs/scale.md). On CPUs it costs nothing and halves a step's memory.
      unroll = sharding.platform() != "cpu"
    if self.stage.remat != "none":
      block = nn.remat(
        Block,
        prevent_cse=unroll,  # a loop cannot be merged anyway
        policy=_REMAT_POLICIES[self.stage.remat],
      )
    scanned = nn.scan(
      block,
      # Intermediates are flax's: kept only where a caller captures them.
      variable_axes={"params": 0, HISTORY: 0, "intermediates": 0},
      split_rngs={"params": True},
      in_axes=(nn.broadcast, nn.broadcast),
      length=num_layers,
      unroll=num_layers if unroll else 1,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )
    x_BLD, _ = scanned(self.stage, self.model, name="blocks")(
      x_BLD, tables, documents_BL
    )
    return x_BLD

  # ----- one position -------------------------------------------------------

  @staticmethod
  def weights(params: dict, stage: StageConfig, matrix) -> list[dict]:
    """Layers are separate arrays: slicing a stacked one copies it each time."""

    def layer(number):
      blocks = jax.tree.map(lambda x: x[number], params["blocks"])
      return Block.weights(blocks, stage, matrix)

    return [layer(number) for number in range(stage.num_layers)]

  @staticmethod
  def fill(history: dict, stage: StageConfig, count_B, num_slots: int) -> list:
    """The caches after a pass over rows whose texts have count_B positions."""
    mixer = mixer_of(stage)

    def layer(number):
      sown = history["blocks"][mixer.NAME]
      sown = jax.tree.map(lambda x: x[number], sown)
      return mixer.fill(stage, sown, count_B, num_slots)

    return [layer(number) for number in range(stage.num_layers)]

  @staticmethod
  def step(layers, stage, model, caches, x_CD, position_C, rows_C, ahead=1):
    """The blocks at one position of each row: x_CD, and the Write to store.

    With `ahead` the block holds so many successive positions of a row side by
    side, rows_C the row each time; each sees those before it.

    Reads the caches and leaves them as they are: one that is changed inside a
    branch is copied on every turn of the loop, so all writes wait till after.
    """
    tables = mixer_of(stage).tables(stage, model, position_C[:, None])
    write = Write(rows_C, position_C, [])
    for weights, cache in zip(layers, caches, strict=True):
      x_CD, entry = Block.step(
        weights, stage, model, cache, x_CD, tables, position_C, rows_C, ahead
      )
      write.entries.append(entry)
    return x_CD, write

  @staticmethod
  def no_write(stage: StageConfig, caches: list, batch: int, num_rows: int):
    """A Write of as many rows as `step` has, which stores nothing."""
    nowhere_C = jnp.full((num_rows,), batch, jnp.int32)
    blank = mixer_of(stage).blank
    entries = [blank(cache, num_rows) for cache in caches]
    return Write(nowhere_C, jnp.zeros_like(nowhere_C), entries)

  @staticmethod
  def write(stage: StageConfig, caches: list, write: Write) -> list:
    return [
      mixer_of(stage).write(cache, write.rows_C, write.position_C, entry)
      for cache, entry in zip(caches, write.entries, strict=True)
    ]

  @staticmethod
  def contracted(stage: StageConfig) -> dict[str, tuple[int, ...]]:
    """Contracted dims of the stacked matrices, by name."""
    of_layer = mixer_of(stage).CONTRACTED | SwiGLU.CONTRACTED
    return {
      name: tuple(dim + 1 for dim in dims) for name, dims in of_layer.items()
    }

"""Weights and arguments of the official code, both ways.

The official AU-Net is facebookresearch/lingua, `apps/aunet`. Its weights map
one to one to ours; `from_lingua` gives a model that computes the same
function, `to_lingua` the way back, exact to the bit:

  encoders.i, decoders.i, trunk -> contract_{i+1}, expand_{i+1}, deepest, with
    the layers of a stack in one array (leading dim N)
  linear weights (out, in) -> (in, out), heads split out
  wq, wk: RoPE on neighbouring pairs -> on halves, a permutation of each head
  transitions.i.{down_norm, trans_down} -> pool_{i+1}.{norm, kernel}
  transitions.i.{up_norm, trans_up} -> upsample_{i+1}.{norm, kernel}
  indexed_linear, pos_encoding -> upsample_{i+1}.offsets

Letters: N layers, D width, E width of the next stage, H heads, K head dim, F
feed-forward, V vocabulary, O offsets.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from aunet_jax.config import ModelConfig, StageConfig
from aunet_jax.convert.lingua_arguments import check_official, from_arguments


class Weight(NamedTuple):
  """One official weight and where it lives here."""

  key: str  # official name
  shape: tuple[int, ...]  # official shape
  path: tuple[str, ...]  # in our parameters
  layer: int | None  # index in the leading dim of our array; None: all of it
  to_ours: Callable[[np.ndarray], np.ndarray]
  to_theirs: Callable[[np.ndarray], np.ndarray]


# ----- layouts --------------------------------------------------------------


def _same(w: np.ndarray) -> np.ndarray:
  return w


def _swap(w: np.ndarray) -> np.ndarray:
  """(..., out, in) <-> (..., in, out)."""
  return np.swapaxes(w, -1, -2)


def _split_heads(w: np.ndarray, head_dim: int) -> np.ndarray:
  """(H * K, D) -> (D, H, K)."""
  return w.reshape(-1, head_dim, w.shape[1]).transpose(2, 0, 1)


def _join_heads(w: np.ndarray) -> np.ndarray:
  """(D, H, K) -> (H * K, D)."""
  return w.transpose(1, 2, 0).reshape(-1, w.shape[0])


def _pairs_to_halves(w: np.ndarray, head_dim: int) -> np.ndarray:
  """`_split_heads`, then components 0, 2, 4, … before 1, 3, 5, …"""
  w = _split_heads(w, head_dim)
  return np.concatenate([w[..., 0::2], w[..., 1::2]], axis=-1)


def _halves_to_pairs(w: np.ndarray) -> np.ndarray:
  first, second = np.split(w, 2, axis=-1)
  return _join_heads(np.stack([first, second], axis=-1).reshape(w.shape))


def _out_to_ours(w: np.ndarray, head_dim: int) -> np.ndarray:
  """(D, H * K) -> (H, K, D)."""
  return w.T.reshape(-1, head_dim, w.shape[0])


def _out_to_theirs(w: np.ndarray) -> np.ndarray:
  return w.reshape(-1, w.shape[-1]).T


# ----- the table ------------------------------------------------------------


def _stack_weights(prefix: str, stack: str, stage: StageConfig):
  """The weights of the blocks of one path."""
  D, F, K = stage.dim, stage.ffn, stage.head_dim
  H, G = stage.num_heads, stage.kv_heads
  rotated = functools.partial(_pairs_to_halves, head_dim=K)
  split = functools.partial(_split_heads, head_dim=K)
  out = functools.partial(_out_to_ours, head_dim=K)
  table = (
    ("attention_norm", (D,), ("attention_norm", "scale"), _same, _same),
    ("attention.wq", (H * K, D), ("attention", "query"), rotated, None),
    ("attention.wk", (G * K, D), ("attention", "key"), rotated, None),
    ("attention.wv", (G * K, D), ("attention", "value"), split, _join_heads),
    ("attention.wo", (D, H * K), ("attention", "out"), out, _out_to_theirs),
    ("ffn_norm", (D,), ("ffn_norm", "scale"), _same, _same),
    ("feed_forward.w1", (F, D), ("ffn", "gate"), _swap, _swap),
    ("feed_forward.w3", (F, D), ("ffn", "up"), _swap, _swap),
    ("feed_forward.w2", (D, F), ("ffn", "down"), _swap, _swap),
  )
  for layer in range(stage.num_layers):
    for name, shape, path, to_ours, to_theirs in table:
      yield Weight(
        f"{prefix}.layers.{layer}.{name}.weight",
        shape,
        (stack, "blocks", *path),
        layer,
        to_ours,
        _halves_to_pairs if to_theirs is None else to_theirs,
      )


def _transition_weights(config: ModelConfig, i: int):
  """The weights between stages i + 1 and i + 2."""
  D, E = config.stages[i].dim, config.stages[i + 1].dim
  O = config.num_offsets
  pool, upsample = f"pool_{i + 1}", f"upsample_{i + 1}"
  table = []
  if config.parametric:
    table += [
      ("down_norm", (D,), (pool, "norm", "scale"), _same),
      ("trans_down", (E, D), (pool, "kernel"), _swap),
      ("up_norm", (E,), (upsample, "norm", "scale"), _same),
      ("trans_up", (D, E), (upsample, "kernel"), _swap),
    ]
  if config.upsampling == "multi_linear":
    offsets = (upsample, "offsets")
    table.append(("indexed_linear", (O, D, E), offsets, _swap))
    if not config.parametric:
      scale = (upsample, "offsets_norm", "scale")
      table.append(("indexed_norm", (E,), scale, _same))
  elif config.upsampling == "repeat":
    table.append(("pos_encoding", (O, E), (upsample, "offsets"), _same))
  for name, shape, path, layout in table:
    key = f"transitions.{i}.{name}.weight"
    yield Weight(key, shape, path, None, layout, layout)


def weights(config: ModelConfig) -> Iterator[Weight]:
  """Every weight of the model, under its official and its own name."""
  V, D, P = config.vocab_size, config.stages[0].dim, config.num_stages
  single = [
    ("tok_embeddings", (V, D), ("embed",), _same),
    ("vocab_norm", (D,), ("norm", "scale"), _same),
    ("vocab", (V, D), ("head",), _swap),
  ]
  if config.level_loss_weight > 0:
    single += [
      ("level_mask_norm", (2 * D,), ("level_norm", "scale"), _same),
      ("level_mask", (P, 2 * D), ("level_head",), _swap),
    ]
  for name, shape, path, layout in single:
    yield Weight(f"{name}.weight", shape, path, None, layout, layout)
  for i, stage in enumerate(config.stages[:-1]):
    yield from _stack_weights(f"encoders.{i}", f"contract_{i + 1}", stage)
    yield from _stack_weights(f"decoders.{i}", f"expand_{i + 1}", stage)
    yield from _transition_weights(config, i)
  yield from _stack_weights("trunk", "deepest", config.stages[-1])


def _buffer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Constants that the official code keeps among its weights."""
  if config.parametric:
    return {}
  return {
    f"transitions.{i}.{name}": (coarse.dim,)
    for i, coarse in enumerate(config.stages[1:])
    for name in ("features_weight", "expand_idx")
  }


def _buffers(config: ModelConfig) -> dict[str, np.ndarray]:
  buffers = {}
  for key, (width,) in _buffer_shapes(config).items():
    _, i, name = key.split(".")
    dim = config.stages[int(i)].dim
    ratio = width // dim
    if name == "expand_idx":
      buffers[key] = np.repeat(np.arange(dim), ratio)
    else:
      fraction = np.arange(1, ratio + 1, dtype=np.float32) / np.float32(ratio)
      buffers[key] = np.tile(fraction, dim)
  return buffers


# ----- weights --------------------------------------------------------------


def _check_shape(shapes: Mapping, key: str, expected: tuple[int, ...]) -> None:
  if key not in shapes:
    raise ValueError(f"the checkpoint has no weight {key!r}.")
  if tuple(shapes[key]) != expected:
    raise ValueError(
      f"weight {key!r} has shape {tuple(shapes[key])}; its model arguments "
      f"give {expected}."
    )


def model_of(
  shapes: Mapping[str, tuple[int, ...]], model_args: Mapping
) -> ModelConfig:
  """The model of a checkpoint, once its names and shapes are all there.

  Looks at no more names than the checkpoint has, and makes no array: what
  arguments claim may be anything.

  Args and errors: as `from_lingua`, with shapes in place of arrays.
  """
  embedding = shapes.get("tok_embeddings.weight")
  if embedding is None:
    raise ValueError("the checkpoint has no weight 'tok_embeddings.weight'.")
  if len(embedding) != 2:
    raise ValueError(
      f"weight 'tok_embeddings.weight' has shape {tuple(embedding)}; it must "
      f"have two dims."
    )
  config = from_arguments(model_args, embedding[0])
  known = set()
  for weight in weights(config):  # as many as arguments say; the first that
    _check_shape(shapes, weight.key, weight.shape)  # is not there ends it
    known.add(weight.key)
  for key, shape in _buffer_shapes(config).items():
    _check_shape(shapes, key, shape)
    known.add(key)
  unknown = sorted(set(shapes) - known)
  if unknown:
    raise ValueError(
      f"the checkpoint holds {unknown[0]!r}, which this model (pooling_type="
      f"{model_args['pooling_type']!r}, {config.num_stages} stages) does not "
      f"have; {len(unknown)} such keys in all."
    )
  return config


def _read_weight(state_dict: Mapping, key: str) -> np.ndarray:
  value = np.asarray(state_dict[key])
  if not jnp.issubdtype(value.dtype, jnp.floating):
    raise ValueError(
      f"weight {key!r} has dtype {value.dtype}; it must be a float."
    )
  return value.astype(np.float32)


def from_lingua(
  state_dict: Mapping[str, np.ndarray], model_args: Mapping
) -> tuple[ModelConfig, dict]:
  """An official checkpoint as our model.

  Args:
    state_dict: official names -> arrays of any float dtype.
    model_args: the `model` part of the official params.json.

  Returns:
    A float32 ModelConfig without document masks, and float32 parameters: the
    function the official code computes in training, for levels as its loader
    gives them. Splitting rules are not part of the weights; set
    `stages[i].rule` to train, generate or evaluate.

  Raises:
    ValueError naming the key that is missing, unknown or misshapen, or the
    argument that has no counterpart here.
  """
  shapes = {key: np.shape(value) for key, value in state_dict.items()}
  config = model_of(shapes, model_args)
  table = list(weights(config))
  for key, expected in _buffers(config).items():
    if not np.array_equal(np.asarray(state_dict[key]), expected):
      raise ValueError(
        f"buffer {key!r} is not the official constant for these dimensions."
      )
  layers = {}  # path -> our array per layer; one entry where there is no layer
  for weight in table:
    value = weight.to_ours(_read_weight(state_dict, weight.key))
    layers.setdefault(weight.path, []).append(value)
  params = {}
  stacked = {weight.path for weight in table if weight.layer is not None}
  for path, values in layers.items():
    node = params
    for name in path[:-1]:
      node = node.setdefault(name, {})
    value = np.stack(values) if path in stacked else values[0]
    node[path[-1]] = jnp.asarray(value)
  return config, params


def to_lingua(config: ModelConfig, params: Mapping) -> dict[str, np.ndarray]:
  """Our parameters under the official names: `from_lingua`'s exact inverse.

  Args: params: unboxed nested dict of arrays, as `AUNet(config)` has them.
  Returns: float32 weights, and the int64 constants of the official code.
  Raises: ValueError naming a parameter that is missing or misshapen, or a part
    that the official code has not.
  """
  check_official(config)
  state_dict = _buffers(config)
  for weight in weights(config):
    node = params
    for name in weight.path:
      if name not in node:
        raise ValueError(f"the parameters have no {'/'.join(weight.path)!r}.")
      node = node[name]
    value = np.asarray(node if weight.layer is None else node[weight.layer])
    value = np.ascontiguousarray(weight.to_theirs(value).astype(np.float32))
    if value.shape != weight.shape:
      raise ValueError(
        f"parameter {'/'.join(weight.path)!r} gives {weight.key!r} the shape "
        f"{value.shape}; the config gives {weight.shape}."
      )
    state_dict[weight.key] = value
  return state_dict

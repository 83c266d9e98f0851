"""Heads for the bytes after the next one: more to learn, and drafts.

The state that predicts the next byte, h_1, and the byte itself predict the one
after it, and so on, each head with the byte before its own (arXiv 2402.05109):

    h_k = h_{k-1} + silu([norm(h_{k-1}), norm(e_{k-1})] W_into) W_out_of

where e_k is the vector of the byte k ahead. The final norm and the head of the
model then give the logits of the byte k ahead (one head matrix for all, as
arXiv 2404.19737). Nothing else reads h_2 on, so the model of the next byte is
as causal as without; `generate/draft.py` drafts with them.

Letters: B batch, L positions, C rows, D width of the byte stage, F hidden, V
vocabulary.
"""

import flax.linen as nn
import jax.numpy as jnp

from aunet_jax.aunet.layers import kernel, norm_of, project, rms_norm
from aunet_jax.aunet.quantize import matmul
from aunet_jax.config import ModelConfig


def widths(model: ModelConfig) -> tuple[int, int]:
  """D and F."""
  D = model.stages[0].dim
  return D, 2 * D


class Head(nn.Module):
  """h_k of h_{k-1} and the vector of the byte before the one it predicts."""

  CONTRACTED = {"into": (0,), "out_of": (0,)}

  model: ModelConfig

  @nn.compact
  def __call__(self, h_BLD, e_BLD):
    D, F = widths(self.model)
    into_DF = kernel(self, "into", 2 * D, (2 * D, F), ("embed", "mlp"))
    out_of_FD = kernel(self, "out_of", F, (F, D), ("mlp", "embed"))
    # Gathered once for both passes.
    into_DF = nn.with_logical_constraint(into_DF, ("activation", "mlp"))
    out_of_FD = nn.with_logical_constraint(out_of_FD, ("mlp", "activation"))
    norm = norm_of(self.model)
    x_BLD = jnp.concatenate(
      [norm(name="state_norm")(h_BLD), norm(name="byte_norm")(e_BLD)], axis=-1
    )
    hidden_BLF = nn.silu(project(x_BLD, into_DF))
    hidden_BLF = nn.with_logical_constraint(
      hidden_BLF, ("batch", "length", "mlp")
    )
    return h_BLD + project(hidden_BLF, out_of_FD)

  # ----- one position -------------------------------------------------------

  @staticmethod
  def weights(params: dict, matrix) -> dict:
    return {
      "state_norm": params["state_norm"]["scale"],
      "byte_norm": params["byte_norm"]["scale"],
      "into": matrix(params["into"]),
      "out_of": matrix(params["out_of"]),
    }

  @staticmethod
  def step(weights, model: ModelConfig, h_CD, e_CD):
    x_CD = jnp.concatenate(
      [
        rms_norm(h_CD, weights["state_norm"], model.norm_eps),
        rms_norm(e_CD, weights["byte_norm"], model.norm_eps),
      ],
      axis=-1,
    )
    return h_CD + matmul(
      nn.silu(matmul(x_CD, weights["into"])), weights["out_of"]
    )

  # ----- counts -------------------------------------------------------------

  @staticmethod
  def num_weights(model: ModelConfig) -> int:
    """Of its matrices, each used once a position."""
    D, F = widths(model)
    return 2 * D * F + F * D

  @staticmethod
  def num_small(model: ModelConfig) -> int:
    return 2 * widths(model)[0]

  @staticmethod
  def saved_bytes(model: ModelConfig, itemsize: int) -> int:
    """Rough bytes of one row that the backward pass needs."""
    D, F = widths(model)
    return model.capacities[0] * (4 * D + 2 * F) * itemsize


class Heads(nn.Module):
  """Every head after the first, under the names ahead_2, ahead_3, …"""

  model: ModelConfig

  @nn.compact
  def __call__(self, h_BLD, embed_VD, targets_BL):
    """Returns: h_2, h_3, …, each (B, L, D).

    Args: h_BLD: what predicts the next byte. targets_BL: that byte. Past the
      last position of a row stand zeros, as arbitrary as what follows a piece:
      `loss.targets_ahead` leaves such positions out.
    """
    found = []
    for k in range(2, self.model.heads + 1):
      e_BLD = embed_VD.astype(h_BLD.dtype)[targets_BL]
      h_BLD = Head(self.model, name=f"ahead_{k}")(h_BLD, e_BLD)
      found.append(h_BLD)
      targets_BL = jnp.pad(targets_BL[:, 1:], ((0, 0), (0, 1)))
    return found

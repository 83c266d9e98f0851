"""AU-Net, the autoregressive U-Net byte language model, in JAX and Flax."""


def load(workdir, mesh=None):
  """The model in a workdir: .model, .params, .splitter, .config, .step.

  See `aunet_jax.checkpoint.load`.
  """
  from aunet_jax import checkpoint  # importing the package stays fast

  return checkpoint.load(workdir, mesh)

"""AU-Net, the autoregressive U-Net byte language model, in JAX and Flax."""


def load(workdir, mesh=None):
  """The model in a workdir: .model, .params, .splitter, .config, .step.

  See `aunet_jax.workdir.load.load`.
  """
  from aunet_jax.workdir import load as loading  # importing us stays fast

  return loading.load(workdir, mesh)

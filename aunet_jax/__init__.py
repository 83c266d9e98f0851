"""AU-Net, the autoregressive U-Net byte language model, in JAX and Flax."""


def load(workdir, mesh=None, trust_rules=False):
  """The model in a workdir: .model, .params, .splitter, .config, .step.

  A workdir whose splitting rules are code of somebody's own is refused unless
  `trust_rules` is True. See `aunet_jax.workdir.load.load`.
  """
  from aunet_jax.workdir import load as loading  # importing us stays fast

  return loading.load(workdir, mesh, trust_rules)

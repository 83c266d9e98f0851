"""How far this package is from the official code, case by case.

  python -m benchmarks.parity [DIRECTORY]

DIRECTORY holds recorded cases (default: tests/golden/official, whose README
describes them). Prints, per case, the largest differences in float32 on CPU
at matmul precision `highest`: of logits relative to the largest absolute
logit, of losses in nats, of gradients in relative norm with the worst weight.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from aunet_jax.aunet.network import AUNet
from aunet_jax.convert import lingua

OFFICIAL = Path(__file__).parents[1] / "tests" / "golden" / "official"


def nats(logits, targets):
  log_probs = jax.nn.log_softmax(logits)
  return -jnp.take_along_axis(log_probs, targets[..., None], -1).mean()


def measure(path: Path) -> str:
  case = dict(np.load(path))
  arguments = json.loads(path.with_suffix(".json").read_text())["model"]
  weights = {k[2:]: v for k, v in case.items() if k.startswith("w.")}
  gradients = {k[2:]: v for k, v in case.items() if k.startswith("g.")}
  config, params = lingua.from_lingua(weights, arguments)
  model = AUNet(config)
  targets = case["targets"].astype(int)

  def losses(params):
    inputs = {"params": params}, case["tokens"], case["level_mask"]
    if config.level_loss_weight == 0:
      logits = model.apply(*inputs)
      return nats(logits, targets), {"logits": logits}
    logits, levels = model.apply(*inputs, None, targets)
    total = nats(logits, targets) + config.level_loss_weight * nats(
      levels, case["target_level_mask"].astype(int)
    )
    return total, {"logits": logits, "mask_logits": levels}

  grad_fn = jax.jit(jax.value_and_grad(losses, has_aux=True))
  with jax.default_matmul_precision("highest"):
    (total, outputs), grads = grad_fn(params)
  logits_error = max(
    np.abs(value - case[name]).max() / np.abs(case[name]).max()
    for name, value in outputs.items()
  )
  official = lingua.to_lingua(config, grads)
  gradient_error, worst = max(
    (np.linalg.norm(official[k] - g) / np.linalg.norm(g), k)
    for k, g in gradients.items()
  )
  loss_error = abs(float(total) - float(case["total_loss"]))
  return (
    f"{path.stem:26s} {logits_error:.1e}  {loss_error:.1e}  "
    f"{gradient_error:.1e}  {worst}"
  )


def main():
  jax.config.update("jax_platforms", "cpu")
  directory = Path(sys.argv[1]) if len(sys.argv) > 1 else OFFICIAL
  print(f"{'case':26s} logits   loss     gradient")
  for path in sorted(directory.glob("*.npz")):
    print(measure(path), flush=True)


if __name__ == "__main__":
  main()

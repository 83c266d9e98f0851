"""Tables of entropies from a model: contexts, means, thresholds, command."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aunet_jax import config
from aunet_jax.aunet.network import AUNet
from aunet_jax.evaluate import entropies
from aunet_jax.splitting import entropy
from aunet_jax.splitting.splitter import Splitter
from aunet_jax.workdir import load


def test_contexts_stay_inside_their_document():
  bos = config.BOS
  bytes_BL = np.array([[7, 8, 9, bos, 1, 2, 3, 4, bos, 5, 6, 0, 0]])
  documents_BL = np.array([[1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3, 0, 0]])
  context_BL, known_BL = entropies.contexts(bytes_BL, documents_BL)
  # The rest of a document whose start is elsewhere: known from its third byte.
  assert np.flatnonzero(known_BL[0]).tolist() == [2, 4, 5, 6, 7, 9, 10]
  assert context_BL[known_BL].tolist() == [
    *(0x070809, 1, 0x0102, 0x010203, 0x020304, 5, 0x0506)
  ]


def test_the_table_holds_means_and_falls_back_to_fewer_bytes():
  context_N = np.array([0x616263, 0x616263, 0x7A6263, 0x000001])
  bits_N = np.array([1.0, 3.0, 6.0, 8.0])
  table = entropies.fit(context_N, bits_N, 2.0)

  def bits(context):
    step = table.blocks[table.index[context >> 8], context & 0xFF]
    return step / entropy.STEPS_PER_BIT

  half_step = 0.51 / entropy.STEPS_PER_BIT
  assert bits(0x616263) == pytest.approx(2.0, abs=half_step)
  assert bits(0x7A6263) == pytest.approx(6.0, abs=half_step)
  assert bits(0x556263) == pytest.approx(10 / 3, abs=half_step)  # "bc"
  assert bits(0x555563) == pytest.approx(10 / 3, abs=half_step)  # "c"
  assert bits(0x555501) == pytest.approx(8.0, abs=half_step)
  assert bits(0x555555) == pytest.approx(4.5, abs=half_step)  # nothing


@pytest.mark.parametrize("mode", entropy.MODES)
@pytest.mark.parametrize("bytes_per_segment", [2.0, 5.0])
def test_the_threshold_gives_the_rate_asked_for(mode, bytes_per_segment):
  rng = np.random.default_rng(0)
  data = rng.integers(97, 123, 50_000)
  padded = np.concatenate([[0, 0], data])
  context_N = padded[:-2] << 16 | padded[1:-1] << 8 | padded[2:]
  table = entropies.fit(
    context_N, rng.uniform(0, 8, len(data)), bytes_per_segment, mode
  )
  cuts_N, _ = table.scan(data.astype(np.uint8), table.start)
  assert 1 / cuts_N.mean() == pytest.approx(bytes_per_segment, rel=0.03)


def tiny_model() -> load.Loaded:
  stage = dict(num_layers=1, head_dim=8, window=None)
  settings = config.ModelConfig(
    stages=(
      config.StageConfig(dim=16, capacity=64, **stage),
      config.StageConfig(dim=16, capacity=32, rule="word@1", **stage),
    ),
    dtype="float32",
  )
  model = AUNet(settings)
  zeros = jnp.zeros((1, 64), jnp.int32)
  variables = jax.jit(model.init)(jax.random.key(0), zeros, zeros)
  params = jax.tree.map(lambda x: 3 * x, variables["params"])
  return load.Loaded(
    model, params, Splitter(settings.rules), config.Config(model=settings), 0
  )


def test_entropies_are_the_models():
  loaded = tiny_model()
  documents = [b"one two three", b"a", b"four, five and 6"] * 5
  context_N, bits_N = entropies.model_entropies(
    loaded, documents, rows_at_once=2
  )
  num_bytes = sum(map(len, documents))
  assert 0.8 * num_bytes < len(context_N) == len(bits_N) <= num_bytes
  assert bits_N.min() >= 0 and bits_N.max() <= 8.1 and np.ptp(bits_N) > 0.01
  apply = jax.jit(loaded.model.apply)
  by_context = {}
  for document in documents[:3]:
    row = np.zeros((1, 64), np.int32)
    row[0, 0] = config.BOS
    row[0, 1 : len(document) + 1] = np.frombuffer(document, np.uint8)
    levels = np.zeros((1, 64), np.int32)
    levels[0, 0] = 1
    levels[0, 1 : len(document) + 1] = loaded.splitter.levels(document)
    logits = apply({"params": loaded.params}, row, levels)
    p = jax.nn.softmax(logits[0])
    bits = -(p * jnp.log2(p)).sum(axis=-1)
    for end in range(1, len(document) + 1):
      last = int.from_bytes(document[max(0, end - 3) : end], "big")
      by_context.setdefault(last, []).append(float(bits[end]))
  found = 0
  for last, bits in zip(context_N.tolist(), bits_N.tolist(), strict=True):
    found += any(abs(bits - one) < 1e-3 for one in by_context[last])
  assert found > 0.6 * len(bits_N)  # the rest: documents cut between rows


def test_a_table_survives_its_file_and_names_itself(tmp_path):
  rng = np.random.default_rng(1)
  table = entropies.fit(
    rng.integers(0, 1 << 24, 500), rng.uniform(0, 8, 500), 3.0, "rise"
  )
  path = tmp_path / "table.npz"
  table.save(path)
  again = entropy.load(path)
  assert again.hash == table.hash and again.mode == "rise"
  other = entropy.Entropy(table.index, table.blocks, "rise", 7)
  assert other.hash != table.hash

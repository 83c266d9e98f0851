"""Decoding speed: this loop, a full forward per byte, and a flat transformer.

  python -m benchmarks.decode --model=R2 --batches=1,8

Prints one JSON object per line. All figures of a line come from one process,
best of several runs. Bytes are taken from a real text (the choice is computed,
then replaced), so that words are as long as words are; weights are random.

  ours       a prompt of 256 bytes and 128 more, prefill apart, per schedule
  forward    the same model, the whole row again for every byte
  flat       a byte transformer of equal parameters, equal window, KV cache
  flatness   time per byte around byte 200 and around byte 8,000
  drafts     plain decoding and drafts at batch 1, whole generations in turns:
             --drafts --workdir=runs/mine for a model trained with model.heads,
             whose drafts are worth something; --drafts --model=R2 tells with
             random weights what a turn costs
"""

import argparse
import dataclasses
import functools
import json
import pydoc_data.topics
import re
import time

import jax
import jax.numpy as jnp
import numpy as np

from aunet_jax.aunet import network, sharding
from aunet_jax.aunet.network import AUNet, abstract_params
from aunet_jax.config import ModelConfig, StageConfig
from aunet_jax.data.rows import make_rows
from aunet_jax.generate import decode, prefill, sampling
from aunet_jax.generate.generator import Generator, counters_of, make_stats
from aunet_jax.generate.sampling import Sampling
from aunet_jax.splitting.splitter import Splitter
from benchmarks import measure

TEXT = "\n".join(pydoc_data.topics.topics.values()).encode()


def stage(dim, num_layers, window, capacity, rule=None, head_dim=64):
  return StageConfig(
    dim=dim,
    num_layers=num_layers,
    head_dim=head_dim,
    window=window,
    capacity=capacity,
    rule=rule,
  )


MODELS = {
  "tiny": (
    stage(64, 1, 64, 1024, head_dim=32),
    stage(128, 2, 64, 256, "word@1", head_dim=32),
  ),
  "R2": (
    stage(256, 3, 256, 1024),
    stage(512, 6, 1024, 256, "word@1"),
  ),
  "R3": (
    stage(256, 3, 256, 1024),
    stage(384, 3, 512, 256, "word@1"),
    stage(512, 6, 1024, 160, "word@2"),
  ),
  "aunet2_1b": (
    stage(512, 3, 512, 8192),
    stage(2048, 25, 8192, 1664, "word@1", head_dim=128),
  ),
}


def num_params(config: ModelConfig) -> int:
  shapes = abstract_params(config)
  return sum(x.size for x in jax.tree.leaves(sharding.unbox(shapes)))


def flat_config(config: ModelConfig) -> ModelConfig:
  """One stage as wide as the deepest, with the number of layers that gives
  the closest parameter count; attention as far as the byte stage's."""
  deepest = config.stages[-1]
  target = num_params(config)

  def flat(num_layers):
    only = dataclasses.replace(
      deepest,
      num_layers=num_layers,
      rule=None,
      window=config.stages[0].window,
      capacity=config.stages[0].capacity,
    )
    return dataclasses.replace(config, stages=(only,))

  one, two = num_params(flat(1)), num_params(flat(2))
  return flat(max(1, round((target - one) / (two - one)) + 1))


def random_params(config: ModelConfig) -> dict:
  """At the initialisers' scale; one block again and again, for speed."""
  rng = np.random.default_rng(0)
  block = rng.standard_normal(1_000_003, np.float32) * 0.03  # a prime
  boxed = abstract_params(config)
  dtype = jnp.dtype(config.param_dtype)

  def draw(path, x):
    if path[-1].key == "scale":
      return jnp.ones(x.shape, dtype)
    return jnp.asarray(np.resize(block, x.shape), dtype)

  return jax.tree_util.tree_map_with_path(draw, sharding.unbox(boxed))


def follow(carry, logits_CV, count_C, rows_C):
  """Draws a byte as generation does, then takes the text's instead."""
  choice, text_BT = carry
  choice, drawn_C, logprob_C, _ = sampling.choose(
    choice, logits_CV, count_C, rows_C
  )
  byte_C = text_BT.at[rows_C, count_C].get(mode="clip")
  # Depends on the draw, so that it cannot be left out; never changes a byte.
  byte_C = jnp.where(drawn_C < 0, drawn_C, byte_C)
  return (choice, text_BT), byte_C, logprob_C, jnp.zeros(byte_C.shape, bool)


_run = jax.jit(
  decode.run,
  static_argnames=(
    "config",
    "splitter_step",
    "choose",
    "schedule",
    "max_turns",
  ),
  donate_argnames="state",
)
_prefill = jax.jit(prefill.prefill, static_argnames=("config", "slots"))


class Bench:
  """A model with prompts cut from the text, ready to time."""

  def __init__(self, config, batch, prompt_bytes, max_bytes, int8=False):
    self.config, self.batch = config, batch
    self.splitter = Splitter(config.rules)
    self.step = self.splitter.step
    self.params = random_params(config)
    make = functools.partial(network.make_weights, config=config, int8=int8)
    self.weights = jax.jit(make)(self.params)
    size = prompt_bytes + max_bytes
    starts = [7919 * b % (len(TEXT) - size) for b in range(batch)]
    pieces = [TEXT[s : s + size] for s in starts]
    self.prompts = [piece[:prompt_bytes] for piece in pieces]
    self.text_BT = np.stack(
      [np.frombuffer(p[prompt_bytes:], np.uint8) for p in pieces]
    ).astype(np.int32)
    self.max_bytes = max_bytes
    self.rows = make_rows(self.prompts, self.splitter, config.num_stages)

  def start(self, limit):
    config = self.config
    prefilled, _ = _prefill(
      self.params,
      self.weights,
      *self.rows[:4],
      config=config.with_capacities(self.rows.capacities),
      slots=prefill.cache_sizes(config, self.rows.capacities, self.max_bytes),
    )
    choice = sampling.make_choice(
      Sampling(temperature=0.8, top_p=0.95),
      self.prompts,
      [0] * self.batch,
      range(self.batch),
    )
    state = decode.start(
      prefilled,
      self.rows,
      np.full((self.batch,), limit, np.int32),
      (choice, jnp.asarray(self.text_BT)),
      decode.num_phases(config),
    )
    return jax.block_until_ready(state)

  def run(self, state, schedule, turns=2**30):
    max_turns = self.text_BT.shape[1]
    state, output = _run(
      self.weights,
      state,
      jnp.int32(turns),
      config=self.config,
      splitter_step=self.step,
      choose=follow,
      schedule=schedule,
      max_turns=max_turns,
    )
    return jax.block_until_ready(state)

  def time(self, names, repeats):
    """name -> (seconds prefill, seconds decode, Stats), fastest runs; the
    schedules take turns, so that a busy machine slows all alike."""
    best = {name: (np.inf, np.inf, None) for name in names}
    for _ in range(repeats + 1):
      for name in names:
        schedule = decode.make_schedule(name, self.batch, self.config)
        begin = time.perf_counter()
        state = self.start(self.max_bytes)
        middle = time.perf_counter()
        state = self.run(state, schedule)
        end = time.perf_counter()
        counters = jax.device_get(counters_of(state))
        stats = make_stats(counters, schedule, self.config)
        before, decoding, _ = best[name]
        best[name] = (
          min(before, middle - begin),
          min(decoding, end - middle),
          stats,
        )
    return best

  def boundaries_per_byte(self):
    """Of the generated text, per stage below the bytes."""
    N, size = self.config.num_stages, len(self.prompts[0])
    texts = [
      prompt + bytes(row.astype(np.uint8))
      for prompt, row in zip(self.prompts, self.text_BT, strict=True)
    ]
    rows = make_rows(texts, self.splitter, N)
    # The last byte's boundary is not computed: nothing follows it.
    levels = rows.levels_BL[:, size + 1 : size + self.max_bytes]
    total = self.batch * self.max_bytes
    return [float((levels >= i).sum() / total) for i in range(1, N)]


def time_forward(bench: Bench, repeats: int) -> float:
  """Seconds per byte of running the whole row for every byte."""
  config = bench.config
  texts = [
    prompt + bytes(row.astype(np.uint8))
    for prompt, row in zip(bench.prompts, bench.text_BT, strict=True)
  ]
  rows = make_rows(texts, bench.splitter, config.num_stages)
  model = AUNet(config.with_capacities(rows.capacities))
  forward = jax.jit(
    lambda p, *row: model.apply({"params": p}, *row)[:, -1].argmax(-1)
  )
  best = np.inf
  for _ in range(repeats + 1):
    begin = time.perf_counter()
    jax.block_until_ready(forward(bench.params, *rows[:3]))
    best = min(best, time.perf_counter() - begin)
  return best


def bandwidth_share(bench: Bench, bytes_per_second: float) -> dict:
  """Weights read per second, over what reading one large array reaches.

  A byte reads the byte stage's weights, and those of a deeper stage once for
  each of its boundaries; caches are not counted.
  """
  per_byte = [1, *bench.boundaries_per_byte()]
  sizes = [0.0] * bench.config.num_stages
  for name, weights in bench.weights.items():
    if name == "embed":
      continue  # one row of it
    number = re.search(r"\d", name)  # pool_1 runs at boundaries of stage 2
    stage = int(number[0]) - 1 if number else 0
    stage += name.startswith(("pool", "upsample"))
    stage = bench.config.num_stages - 1 if name == "deepest" else stage
    sizes[stage] += sum(x.nbytes for x in jax.tree.leaves(weights))
  read = sum(n * size for n, size in zip(per_byte, sizes, strict=True))
  bandwidth = measure.memory_bandwidth()
  return {
    "weight_bytes_per_byte": read,
    "memory_bandwidth": bandwidth,
    "memory_bandwidth_share": read * bytes_per_second / bandwidth,
  }


def bench_speed(args, config, batch):
  bench = Bench(config, batch, args.prompt_bytes, args.max_bytes, args.int8)
  total = batch * args.max_bytes
  line = {
    "model": args.model,
    "params": num_params(config),
    "dtype": config.dtype,
    "int8": args.int8,
    "batch": batch,
    "prompt_bytes": args.prompt_bytes,
    "max_bytes": args.max_bytes,
    **measure.machine("decode"),
    "matmul_flops": measure.matmul_flops(config.dtype),
    "boundaries_per_byte": bench.boundaries_per_byte(),
    "schedules": {},
  }
  names = ["any"] if batch == 1 else args.schedules.split(",")
  times = bench.time(names, args.repeats)
  for name, (prefill_seconds, seconds, stats) in times.items():
    line["schedules"][name] = {
      "decode_bytes_per_second": total / seconds,
      "bytes_per_second": total / (seconds + prefill_seconds),
      "slots_per_byte": stats.slots_per_byte(),
    }
  best = max(
    run["decode_bytes_per_second"] for run in line["schedules"].values()
  )
  if batch == 1:
    line |= bandwidth_share(bench, best)
  if args.baselines:
    line["forward_bytes_per_second"] = batch / time_forward(bench, 2)
    line["ratio_to_forward"] = best / line["forward_bytes_per_second"]
    flat = flat_config(config)
    flat_bench = Bench(flat, batch, args.prompt_bytes, args.max_bytes)
    _, seconds, _ = flat_bench.time(["any"], args.repeats)["any"]
    line["flat_params"] = num_params(flat)
    line["flat_layers"] = flat.stages[0].num_layers
    line["flat_bytes_per_second"] = total / seconds
    line["ratio_to_flat"] = best / line["flat_bytes_per_second"]
  print(json.dumps(line), flush=True)


def bench_flatness(args, config):
  """Seconds per byte of 100 bytes from byte 200 and from byte 8,000, in turns,
  best of several each; the same words in both places."""
  size = 100
  times = {200: np.inf, 8000: np.inf}
  benches = {}
  for begin in times:
    bench = Bench(config, 1, begin, size)
    # The same hundred bytes follow both, so the same work is timed.
    piece = np.frombuffer(TEXT[:size], np.uint8).astype(np.int32)
    bench.text_BT = piece[None]
    bench.max_bytes = 8192  # rings of equal size
    benches[begin] = bench
  schedule = decode.make_schedule("any", 1, config)
  for _ in range(args.repeats + 2):
    for begin, bench in benches.items():
      state = bench.start(size)
      clock = time.perf_counter()
      bench.run(state, schedule)
      times[begin] = min(times[begin], time.perf_counter() - clock)
  print(
    json.dumps(
      {
        "model": args.model,
        **measure.machine("decode"),
        "milliseconds_per_byte_at_200": 1e3 * times[200] / size,
        "milliseconds_per_byte_at_8000": 1e3 * times[8000] / size,
        "ratio": times[8000] / times[200],
      }
    ),
    flush=True,
  )


def bench_drafts(args, config):
  """Bytes/s of plain decoding and of drafts, by temperature."""
  if args.workdir is not None:
    generator = Generator.from_workdir(args.workdir, int8=args.int8)
  else:
    config = dataclasses.replace(config, heads=args.heads)
    splitter = Splitter(config.rules)
    generator = Generator(
      config, random_params(config), splitter, int8=args.int8
    )
  starts = [7919 * b % (len(TEXT) - 4096) for b in range(args.texts)]
  prompts = [TEXT[s : s + args.prompt_bytes] for s in starts]
  line = {
    "model": args.workdir or args.model,
    "params": num_params(generator.config),
    "dtype": generator.config.dtype,
    "heads": generator.config.heads,
    "prompt_bytes": args.prompt_bytes,
    "max_bytes": args.max_bytes,
    "texts": args.texts,
    **measure.machine("decode"),
    "by_temperature": {},
  }
  for temperature in (0.0, 0.8, 1.0):
    settings = Sampling(temperature=temperature)
    seconds = {False: 0.0, True: 0.0}
    num_bytes = num_turns = num_same = 0
    for seed, prompt in enumerate(prompts):
      best, texts, stats = {False: np.inf, True: np.inf}, {}, []
      for _ in range(args.repeats + 1):
        for drafts in best:
          begin = time.perf_counter()
          (texts[drafts],) = generator.generate(
            [prompt],
            max_bytes=args.max_bytes,
            settings=settings,
            seed=seed,
            drafts=drafts,
            on_stats=stats.append if drafts else None,
          )
          passed = time.perf_counter() - begin
          best[drafts] = min(best[drafts], passed)
      num_same += texts[False].data == texts[True].data
      num_bytes += stats[0].num_bytes
      num_turns += stats[0].slots[0] / generator.config.heads
      for drafts in seconds:
        seconds[drafts] += best[drafts]
    bytes_per_turn = num_bytes / num_turns
    ratio = seconds[False] / seconds[True]
    line["by_temperature"][temperature] = {
      "plain_bytes_per_second": num_bytes / seconds[False],
      "drafts_bytes_per_second": num_bytes / seconds[True],
      "ratio": ratio,
      "bytes_per_turn": bytes_per_turn,
      # A turn over a byte of plain decoding: below bytes_per_turn, drafts pay.
      "turn_over_byte": bytes_per_turn / ratio,
      "same_texts": num_same,
    }
  print(json.dumps(line), flush=True)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--model", default="R2", choices=MODELS)
  parser.add_argument("--batches", default="1,8")
  parser.add_argument("--schedules", default="any,sync,half,pack")
  parser.add_argument("--prompt_bytes", type=int, default=256)
  parser.add_argument("--max_bytes", type=int, default=128)
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--int8", action="store_true")
  parser.add_argument("--baselines", action="store_true")
  parser.add_argument("--flatness", action="store_true")
  parser.add_argument("--drafts", action="store_true")
  parser.add_argument("--workdir", help="of a trained model, for --drafts")
  parser.add_argument("--heads", type=int, default=4, help="for --drafts")
  parser.add_argument("--texts", type=int, default=4, help="for --drafts")
  args = parser.parse_args()
  config = ModelConfig(stages=MODELS[args.model], dtype=args.dtype)
  if args.flatness:
    bench_flatness(args, config)
    return
  if args.drafts:
    bench_drafts(args, config)
    return
  for batch in args.batches.split(","):
    bench_speed(args, config, int(batch))


if __name__ == "__main__":
  main()

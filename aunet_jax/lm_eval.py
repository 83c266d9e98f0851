"""Scores a model on tasks of lm-evaluation-harness (pip install '.[eval]').

  python -m aunet_jax.lm_eval --workdir=runs/small --tasks=lambada_openai,piqa

  # a task of your own, or the harness's with data by path, without a network
  python -m aunet_jax.lm_eval --workdir=runs/small --tasks=my_task \\
      --include_path=tasks --limit=200 --output=results.json

Prints a line a metric, with its standard error; --output writes the harness's
results object, with the number of requests that were cut on the left under
`truncated`.
docs/evaluation.md says which number means what.
"""

import argparse
import contextlib
import difflib
import json
import os
import sys

from aunet_jax import terminal
from aunet_jax.aunet import sharding
from aunet_jax.config import MeshConfig
from aunet_jax.files import written_whole
from aunet_jax.generate.generator import Generator
from aunet_jax.generate.sampling import Sampling
from aunet_jax.workdir import load


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m aunet_jax.lm_eval",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--workdir", required=True, help="a trained run")
  add("--tasks", required=True, help="names, joined by commas")
  add("--include_path", metavar="DIR", help="folder of task files (YAML)")
  add("--num_fewshot", type=int, help="examples before a question")
  add(
    "--apply_chat_template",
    action="store_true",
    help="ask as a user, of a model that was tuned on conversations",
  )
  add(
    "--fewshot_as_multiturn",
    action="store_true",
    help="examples are turns of their own",
  )
  add("--system_instruction", metavar="TEXT", help="what the system says first")
  add("--limit", type=int, help="questions of a task (default: all)")
  add("--batch_size", type=int, default=16, help="texts at a time (default 16)")
  add("--use_cache", metavar="FILE", help="keep answers, and use those kept")
  add("--seed", type=int, default=0, help="of text that is drawn (default 0)")
  add("--output", metavar="FILE", help="write the results as JSON")
  terminal.add_trust_rules(parser)
  return parser


def _shown(results: dict) -> str:
  """One line a task and metric, with the standard error where it is known."""
  lines = []
  for task, metrics in results.items():
    for key, value in metrics.items():
      name, _, filtered = key.partition(",")
      if isinstance(value, str) or name.endswith("_stderr") or not filtered:
        continue
      error = metrics.get(f"{name}_stderr,{filtered}")
      spread = f" +- {error:.4f}" if isinstance(error, float) else ""
      kind = "" if filtered == "none" else f" ({filtered})"
      lines.append(f"{task}  {name}{kind}  {value:.4f}{spread}")
  return "\n".join(lines)


@terminal.command
def main(argv: list[str] | None = None) -> None:
  args = _parser().parse_args(argv)
  for name in ("batch_size", "limit"):
    value = getattr(args, name)
    if value is not None and value < 1:
      raise ValueError(f"--{name}={value} must be positive.")
  try:
    import lm_eval
    from lm_eval import tasks as lm_tasks

    from aunet_jax.evaluate.harness import HarnessModel
  except ImportError as error:
    raise ValueError(
      f"lm-evaluation-harness cannot be imported ({error}): pip install "
      f"'.[eval]'."
    ) from None
  if args.fewshot_as_multiturn and not args.apply_chat_template:
    raise ValueError("--fewshot_as_multiturn needs --apply_chat_template.")
  # The harness forks to bootstrap an error, and so does the writer of its
  # table, which is not used here: a fork of JAX's threads can hang.
  os.environ.setdefault("DISABLE_MULTIPROC", "1")
  with contextlib.ExitStack() as stack:
    file = None
    if args.output is not None:  # opened first: hours may follow
      file = stack.enter_context(written_whole(args.output))
    mesh = sharding.make_mesh(MeshConfig())
    loaded = load.load(args.workdir, mesh, args.trust_rules)
    if loaded.tokenizer is not None:
      raise ValueError(
        f"{args.workdir} holds a model of tokens; tasks are for models of "
        f"bytes."
      )
    manager = lm_tasks.TaskManager(include_path=args.include_path)
    names = [name for name in args.tasks.split(",") if name]
    for name in names:
      if not manager.match_tasks([name]):
        close = difflib.get_close_matches(name, manager.all_tasks, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(f"--tasks: there is no task {name!r}.{hint}")
    generator = Generator(
      loaded.config.model, loaded.params, loaded.splitter, mesh=mesh
    )

    def write(prompts, writing):
      settings = Sampling(
        temperature=writing.temperature,
        top_p=writing.top_p,
        top_k=writing.top_k,
      )
      completions = generator.generate(
        prompts, max_bytes=writing.max_bytes, settings=settings,
        stop=writing.stop, seed=args.seed,
      )  # fmt: skip
      return [one.data for one in completions]

    model = HarnessModel(
      loaded, mesh, write, args.batch_size, args.apply_chat_template
    )
    results = lm_eval.simple_evaluate(
      model=model,
      tasks=names,
      num_fewshot=args.num_fewshot,
      apply_chat_template=args.apply_chat_template,
      fewshot_as_multiturn=args.fewshot_as_multiturn,
      system_instruction=args.system_instruction,
      limit=args.limit,
      use_cache=args.use_cache,
      task_manager=manager,
    )
    results["truncated"] = model.truncated
    print(_shown(results["results"]))
    print(f"{model.truncated} requests were longer than the model's rows")
    if file is not None:
      text = json.dumps(results, default=str, ensure_ascii=False, indent=1)
      file.write(text.encode("utf-8", errors="surrogatepass") + b"\n")


if __name__ == "__main__":
  sys.exit(main())

"""Scores a model on tasks of lm-evaluation-harness (pip install '.[eval]').

  python -m aunet_jax.lm_eval --workdir=runs/quickstart \\
      --tasks=lambada_openai,piqa

  # tasks shipped here (--tasks=list shows them): local data, no network
  python -m aunet_jax.lm_eval --workdir=runs/quickstart --data_dir=data/eval \\
      --tasks=aunet_lambada,aunet_cute --limit=200 --output=results.json

A name may be one task of a group, such as aunet_cute::spell, or a pattern, such
as 'aunet_arc_*'. --include_path names a folder with your own task files; they
take precedence over others of the same name.

Prints one line per metric, with its standard error; --output writes the
harness's results object, in which `truncated` is the number of requests that
were cut on the left, and `in_parts` that of them whose continuation alone was
longer than a row. docs/evaluation.md explains every number.
"""

import argparse
import contextlib
import difflib
import json
import logging
import os
import re
import sys
from pathlib import Path

from aunet_jax import terminal
from aunet_jax.aunet import sharding
from aunet_jax.config import MeshConfig
from aunet_jax.files import written_whole
from aunet_jax.generate.generator import Generator
from aunet_jax.generate.sampling import Sampling
from aunet_jax.workdir import load

TASKS = Path(__file__).parent / "evaluate" / "tasks"  # the files shipped
PREFIX = "aunet_"  # of their names; no task of the harness has it
BOOTSTRAPS = 1000  # of metrics that are no mean, for their standard errors


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m aunet_jax.lm_eval",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--workdir", help="workdir of a trained run")
  add("--tasks", required=True, help="task names, joined by commas, or list")
  add("--include_path", metavar="DIR", help="folder of task files (YAML)")
  add(
    "--data_dir",
    metavar="DIR",
    help="folders with the data of the tasks shipped here, joined by commas",
  )
  add(
    "--run_code",
    action="store_true",
    help="allow tasks to run the programs that the model writes",
  )
  add("--num_fewshot", type=int, help="solved examples before a question")
  add(
    "--apply_chat_template",
    action="store_true",
    help="ask as the user, for a model that was tuned on conversations",
  )
  add(
    "--fewshot_as_multiturn",
    action="store_true",
    help="make every example a turn",
  )
  add("--system_instruction", metavar="TEXT", help="the system's turn")
  add("--limit", type=int, help="questions per task (default: all)")
  add("--batch_size", type=int, default=16, help="texts at a time (default 16)")
  add(
    "--use_cache", metavar="FILE", help="file that caches answers between runs"
  )
  add("--seed", type=int, default=0, help="for sampled text (default 0)")
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


def _shipped() -> str:
  """The tasks of this package, each with the first line of its file."""
  lines = []
  for path in sorted(TASKS.glob("[!_]*.yaml")):
    text = path.read_text()
    name = re.search(r"^(?:task|group): (.+)$", text, re.MULTILINE)[1]
    lines.append(f"{name:26}{text.partition(chr(10))[0].removeprefix('# ')}")
  return "\n".join(lines)


def _close(name: str, names) -> str:
  close = difflib.get_close_matches(name, names, n=1)
  return f" Did you mean {close[0]}?" if close else ""


def _tasks(pattern: str, manager, run_code: bool) -> list:
  """Tasks and groups, with their data, that a name of --tasks stands for.

  Raises: ValueError for what there is not, or may not run.
  """
  group, colons, part = pattern.partition("::")
  names = manager.match_tasks([group])
  if not names:
    close = _close(group, manager.all_tasks)
    raise ValueError(f"--tasks: there is no task {group!r}.{close}")
  found = []
  for name in names:
    loaded = manager.load([name])
    tasks, groups = loaded["tasks"], loaded["groups"]
    for task in tasks.values():
      if getattr(task, "UNSAFE_CODE", False) and not run_code:
        raise ValueError(
          f"{task.task_name} runs programs that the model writes: allow it "
          f"with --run_code, in a container if you do not trust the model."
        )
    if colons and pattern not in tasks:
      close = _close(pattern, tasks)
      raise ValueError(f"--tasks: {name} has no task {part!r}.{close}")
    if colons:
      found.append(tasks[pattern])
    else:
      found += [groups[name]] if name in groups else tasks.values()
  return found


def _select(args: argparse.Namespace) -> list:
  """The tasks to run, with their data.

  The harness's own, thousands of files, are read only where a name is not among
  ours and the user's.
  """
  from lm_eval.tasks import TaskManager

  # Said of every task whose data a function reads.
  logging.getLogger("lm_eval.api.task").addFilter(
    lambda record: "Custom kwargs can be passed" not in record.getMessage()
  )
  paths = [str(TASKS), *([args.include_path] if args.include_path else [])]
  metadata = {} if args.data_dir is None else {"data_dir": args.data_dir}
  patterns = [name for name in args.tasks.split(",") if name]
  manager = TaskManager(
    include_path=paths, include_defaults=False, metadata=metadata
  )
  unknown = [p for p in patterns if not manager.match_tasks([p.split("::")[0]])]
  if not all(name.startswith(PREFIX) for name in unknown):
    manager = TaskManager(include_path=paths, metadata=metadata)
  found = []
  for name in patterns:
    found += _tasks(name, manager, args.run_code)
  if not found:
    raise ValueError("--tasks names no task.")
  return found


@terminal.command
def main(argv: list[str] | None = None) -> None:
  args = _parser().parse_args(argv)
  if args.tasks == "list":
    print(_shipped())
    return
  if args.workdir is None:
    raise ValueError("--workdir=DIR says which trained run is scored.")
  for flag in ("include_path", "data_dir"):
    for folder in (getattr(args, flag) or "").split(","):
      if folder and not Path(folder).is_dir():
        raise ValueError(f"--{flag}={folder}: there is no such folder.")
  for name in ("batch_size", "limit"):
    value = getattr(args, name)
    if value is not None and value < 1:
      raise ValueError(f"--{name}={value} must be positive.")
  try:
    import lm_eval
    from lm_eval.tasks import TaskManager

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
  selected = _select(args)
  with contextlib.ExitStack() as stack:
    file = None
    if args.output is not None:  # opened first: hours may follow
      file = stack.enter_context(written_whole(args.output))
    mesh = sharding.make_mesh(MeshConfig())
    loaded = load.load(args.workdir, mesh, args.trust_rules)
    generator = Generator(
      loaded.config.model,
      loaded.params,
      loaded.splitter,
      tokenizer=loaded.tokenizer,
      mesh=mesh,
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
      tasks=selected,
      num_fewshot=args.num_fewshot,
      apply_chat_template=args.apply_chat_template,
      fewshot_as_multiturn=args.fewshot_as_multiturn,
      system_instruction=args.system_instruction,
      limit=args.limit,
      use_cache=args.use_cache,
      bootstrap_iters=BOOTSTRAPS,
      confirm_run_unsafe_code=args.run_code,
      task_manager=TaskManager(include_defaults=False),
    )
    results |= {"truncated": model.truncated, "in_parts": model.in_parts}
    print(_shown(results["results"]))
    print(
      f"{model.truncated} requests were longer than the model's rows, "
      f"{model.in_parts} of them by what is scored alone"
    )
    if file is not None:
      text = json.dumps(results, default=str, ensure_ascii=False, indent=1)
      file.write(text.encode("utf-8", errors="surrogatepass") + b"\n")


if __name__ == "__main__":
  sys.exit(main())

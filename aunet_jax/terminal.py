"""What commands share: exit statuses, the error line, readable numbers."""

import argparse
import functools
import io
import os
import sys
from collections.abc import Callable

EXIT_FAILED = 1  # the run failed; the same command may be tried again
EXIT_BAD_INPUT = 2  # the command cannot work as it was given; no retry helps
# Exit status after a stop by signal with everything saved (sysexits'
# EX_TEMPFAIL): a launcher may run the same command again.
EXIT_STOPPED = 75
EXIT_INTERRUPTED = 130  # Ctrl-C, as a shell reports it

# File errors that the same command meets again: what was named is wrong.
_WRONG_PATH = (
  FileExistsError,
  FileNotFoundError,
  IsADirectoryError,
  NotADirectoryError,
  PermissionError,
)


class Failure(RuntimeError):
  """An error whose message tells the user what happened and what to do."""

  status = EXIT_FAILED


def status_of(error: Exception) -> int:
  """The exit status that says whether trying again can help."""
  if isinstance(error, Failure):
    return error.status
  if isinstance(error, OSError) and not isinstance(error, _WRONG_PATH):
    return EXIT_FAILED  # a full disk, a server that does not answer
  return EXIT_BAD_INPUT


def command(main: Callable[..., int | None]) -> Callable[..., int]:
  """Makes `main` return an exit status and say errors in one line.

  What a user or the surroundings can cause (ValueError, OSError, Failure,
  MemoryError) becomes `error: …` on stderr; anything else is a defect of ours
  and keeps its traceback. Output that the terminal's encoding lacks is escaped,
  not fatal.
  """

  @functools.wraps(main)
  def run(*args, **kwargs) -> int:
    for stream in (sys.stdout, sys.stderr):
      if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    try:
      status = main(*args, **kwargs)
      sys.stdout.flush()
      return status or 0
    except BrokenPipeError:  # the reader of our output has seen enough
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
      return 0
    except (ValueError, OSError, Failure) as error:
      print(f"error: {error}", file=sys.stderr)
      return status_of(error)
    except MemoryError as error:  # rows of an absurd size in a config
      reason = str(error) or "no reason given"
      print(f"error: not enough memory: {reason}", file=sys.stderr)
      return EXIT_FAILED
    except KeyboardInterrupt:
      print("interrupted", file=sys.stderr)
      return EXIT_INTERRUPTED

  return run


def add_trust_rules(parser: argparse.ArgumentParser) -> None:
  """The flag of every command that reads a model out of a workdir."""
  parser.add_argument(
    "--trust_rules",
    action="store_true",
    help="run code that a workdir's config.json names as splitting rule "
    "(MODULE:NAME), and read tables of rules outside the workdir",
  )


def si(value: float) -> str:
  for unit in ("", "k", "M"):
    if value < 1000:
      return f"{value:.3g} {unit}"
    value /= 1000
  return f"{value:.3g} G"


def duration(seconds: float) -> str:
  minutes, seconds = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return (
    f"{hours}:{minutes:02}:{seconds:02}"
    if hours
    else (f"{minutes}:{seconds:02}")
  )

"""Loops that are compiled for the host's processor."""

import functools
from collections.abc import Callable

import numba


def compiled(function: Callable) -> Callable:
  """Compiles a function of arrays and numbers, without the interpreter lock.

  The machine code is kept where Numba keeps it, which saves the next process
  about a second. Where no directory can be written (a container, another
  user's installation), or what lies there is damaged, the function is compiled
  for this process alone.
  """
  plain = numba.njit(nogil=True)(function)
  try:
    chosen = numba.njit(nogil=True, cache=True)(function)
  except RuntimeError:  # "no locator available": nowhere to write
    return plain

  @functools.wraps(function)
  def call(*args):
    nonlocal chosen
    try:
      return chosen(*args)
    except Exception:
      if chosen is plain:
        raise
    # The cache is read and written before the function runs, so its failure
    # has changed no argument. Anything else fails again.
    chosen = plain
    return plain(*args)

  return call

"""What the C library does with this process's memory (Linux, glibc)."""

import ctypes
import os
import sys
from pathlib import Path


def use_huge_pages() -> None:
  """Starts this process anew with memory in pages of 2 MB, where Linux asks.

  On CPUs, XLA asks the C library for a step's memory anew at every step, and
  the kernel clears it page by page: of 4 kB, that takes a fifth of a step.
  glibc takes large pages only if told at the start of a process, and Linux may
  want them asked for (transparent_hugepage: madvise). Call it before JAX is
  imported. GLIBC_TUNABLES that name hugetlb are left alone.
  """
  wanted = "glibc.malloc.hugetlb"
  tunables = os.environ.get("GLIBC_TUNABLES", "")
  try:
    mode = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
  except OSError:
    return
  if sys.executable and "[madvise]" in mode and wanted not in tunables:
    both = [*filter(None, [tunables]), f"{wanted}=1"]
    os.environ["GLIBC_TUNABLES"] = ":".join(both)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def give_back() -> None:
  """Gives the system the memory that a compilation has freed.

  The C library keeps it for later, in pieces that a step's arrays do not fit
  into: 0.3 to 0.4 GB after the quickstart's step was compiled.
  """
  trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
  if trim is not None:  # other C libraries give back by themselves
    trim(0)

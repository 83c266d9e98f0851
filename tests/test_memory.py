"""A process starts with large pages, and gives back what compiling freed."""

import os
import pathlib
import subprocess
import sys

from aunet_jax import memory


def test_the_trainer_starts_with_huge_pages_once(tmp_path):
  script = tmp_path / "started.py"
  script.write_text(
    "import os, sys\n"
    "from aunet_jax import memory\n"
    "print(os.getpid(), flush=True)\n"
    "memory.use_huge_pages()\n"
    "print(os.environ.get('GLIBC_TUNABLES'), sys.argv[1:])\n"
  )
  enabled = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
  asked = enabled.exists() and "[madvise]" in enabled.read_text()

  def run(**env):
    command = [sys.executable, str(script), "a b", "--flag='x'"]
    env = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | env
    env["PYTHONPATH"] = str(pathlib.Path(memory.__file__).parents[1])
    done = subprocess.run(
      command, env=env, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()

  *pids, last = run()
  assert len(pids) == 1 + asked and len(set(pids)) == 1
  assert last.endswith("""['a b', "--flag='x'"]""")
  assert last.startswith("glibc.malloc.hugetlb=1" if asked else "None")
  *pids, last = run(GLIBC_TUNABLES="glibc.malloc.hugetlb=0")
  assert len(pids) == 1 and last.startswith("glibc.malloc.hugetlb=0 ")


def test_freed_memory_is_given_back():
  code = (
    "import pathlib\n"
    "from aunet_jax import memory\n"
    "def resident():\n"
    "  pages = pathlib.Path('/proc/self/statm').read_text().split()[1]\n"
    "  return 4096 * int(pages)\n"
    "kept = [b'x' * (64 << 10) for _ in range(2000)]\n"
    "last = b'x' * (64 << 10)\n"  # the heap cannot shrink below it
    "kept.clear()\n"
    "before = resident()\n"
    "memory.give_back()\n"
    "print(before, resident())\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  before, after = map(int, done.stdout.split())
  assert before - after > 100 << 20

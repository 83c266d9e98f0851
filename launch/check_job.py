#!/usr/bin/env python3
"""Looks at what a job needs before machines are asked for; called by scripts.

  check_job.py --devices=N [...] -- TRAINER FLAGS

Refuses (status 2, one line) a config or flag that the trainer would refuse,
data that need a package which the machines will not have, paths below a bucket
that is not attached, and a mesh or batch that does not fit the devices. With
--job_devices other than --devices, prints the flags of a mesh that still
divides the batch, one a line. Where the package cannot be imported here (a
machine that only launches), only what the flags themselves say is checked.
"""

import argparse
import importlib.util
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

# How a path ends or begins, and the packages of which one must be there.
NEEDS = (
  (re.compile(r"\.zstd?$"), ("backports.zstd", "zstandard")),
  (re.compile(r"\.parquet$"), ("pyarrow",)),
  (re.compile(r"^gs://"), ("gcsfs",)),
  (re.compile(r"^s3://"), ("s3fs",)),
)


class Mesh(NamedTuple):
  data: int
  fsdp: int
  tensor: int
  accumulation: int


def fits(mesh: Mesh, batch_size: int, devices: int, slices: int) -> bool:
  """Whether a mesh uses all devices and gives each the same rows."""
  return (
    mesh.data * mesh.fsdp * mesh.tensor == devices
    and mesh.data % slices == 0
    and batch_size % (mesh.accumulation * mesh.data * mesh.fsdp) == 0
  )


def choose_mesh(
  mesh: Mesh, batch_size: int, devices: int, slices: int, width: int = 0
) -> Mesh | None:
  """The mesh nearest to `mesh` that fits other devices; None: there is none.

  `tensor` stays. `fsdp` does not shrink where that can be, so that no device
  holds more parameters; and the rows a device computes at once do not grow:
  accumulation does, which changes no loss.

  Args: width: that `fsdp` divides, as it does the model's matrices.
  """
  rows = batch_size / (mesh.accumulation * mesh.data * mesh.fsdp)
  found = []
  for fsdp in range(1, devices // mesh.tensor + 1):
    data = devices // (mesh.tensor * fsdp)
    for accumulation in range(1, batch_size + 1):
      new = Mesh(data, fsdp, mesh.tensor, accumulation)
      if (
        fits(new, batch_size, devices, slices)
        and width % fsdp == 0
        and batch_size / (accumulation * data * fsdp) <= rows
      ):
        found.append(new)
        break  # fewest microbatches
  return min(
    found,
    key=lambda new: (new.fsdp < mesh.fsdp, abs(new.fsdp - mesh.fsdp)),
    default=None,
  )


def job_mesh(config, devices: int) -> Mesh:
  """The mesh of a config with the axis left out (None) computed."""
  axes = [config.mesh.data, config.mesh.fsdp, config.mesh.tensor]
  known = 1
  for size in axes:
    known *= size or 1
  axes = [devices // known if size is None else size for size in axes]
  return Mesh(*axes, config.train.grad_accumulation)


def installed(names: tuple[str, ...], requirements: str) -> bool:
  """Whether one of the packages is in a lock file, or in this Python."""
  if requirements:
    locked = {
      line.split("==")[0].lower().replace("-", ".").replace("_", ".")
      for line in Path(requirements).read_text().splitlines()
    }
    return not locked.isdisjoint(names)
  for name in names:
    try:
      if importlib.util.find_spec(name):
        return True
    except ModuleNotFoundError:  # of a parent package
      continue
  return False


def paths_of(value) -> list[str]:
  """The paths and globs of a data setting, in all forms it may have."""
  if isinstance(value, str):
    return [part.strip() for part in value.split(",")]
  if isinstance(value, dict):
    return [str(value.get("path", ""))]
  return [path for item in value or () for path in paths_of(item)]


def check_paths(paths: list[str], bucket: str, requirements: str) -> None:
  for path in paths:
    if path.startswith("/mnt/bucket") and not bucket:
      raise ValueError(f"{path} is in a bucket: set BUCKET.")
    for pattern, names in NEEDS:
      if pattern.search(path) and not installed(names, requirements):
        where = requirements or "this Python"
        raise ValueError(
          f"reading {path} needs {' or '.join(names)}, which {where} lacks."
        )


def check_cache(workdir: str, cache_dir: str | None) -> None:
  """The packed index is read at random, so it must lie on a disk."""
  if workdir.startswith("gs://") and "://" in (cache_dir or "://"):
    raise ValueError(
      f"WORKDIR={workdir} is a bucket: add "
      f"--config.data.cache_dir=/tmp/aunet_data, a directory of each host, to "
      f"FLAGS."
    )


def mesh_flags(
  config, job_devices: int, devices: int, slices: int
) -> list[str]:
  """Flags of the mesh for `devices`; none where the job's own fits.

  Raises: ValueError where no mesh fits, naming the nearest smaller count.
  """
  mesh = job_mesh(config, job_devices)
  batch = config.train.batch_size
  if job_devices == devices and fits(mesh, batch, devices, slices):
    return []
  if job_devices == devices:
    raise ValueError(
      f"mesh data={mesh.data} x fsdp={mesh.fsdp} x tensor={mesh.tensor} with "
      f"train.grad_accumulation={mesh.accumulation} and batch_size={batch} "
      f"does not fit {devices} devices in {slices} slices: the axes must "
      f"multiply to the devices, data be a multiple of the slices, and data x "
      f"fsdp x grad_accumulation divide the batch."
    )
  width = math.gcd(*(stage.dim for stage in config.model.stages))
  new = choose_mesh(mesh, batch, devices, slices, width)
  if new is None:
    smaller = (
      n
      for n in range(devices - 1, 0, -1)
      if choose_mesh(mesh, batch, n, 1, width)
    )
    raise ValueError(
      f"no mesh of {devices} devices divides batch_size={batch}; the next "
      f"smaller number that does is {next(smaller, 0)}."
    )
  held = mesh.fsdp / new.fsdp
  print(
    f"launch: {devices} devices for {job_devices}: mesh data={new.data} x "
    f"fsdp={new.fsdp} x tensor={new.tensor}, {new.accumulation} microbatches"
    + (f"; each holds {held:g} times the parameters." if held > 1 else "."),
    file=sys.stderr,
  )
  return [
    f"--config.mesh.data={new.data}",
    f"--config.mesh.fsdp={new.fsdp}",
    f"--config.train.grad_accumulation={new.accumulation}",
  ]


def main(argv: list[str]) -> int:
  split = argv.index("--")
  parser = argparse.ArgumentParser()
  parser.add_argument("--job_devices", type=int, default=0)
  parser.add_argument("--devices", type=int, default=0, help="0: not known")
  parser.add_argument("--slices", type=int, default=1)
  parser.add_argument("--bucket", default="")
  parser.add_argument("--requirements", default="")
  args = parser.parse_args(argv[:split])
  flags = argv[split + 1 :]
  values = dict(flag.split("=", 1) for flag in flags if "=" in flag)
  paths = [values["--workdir"]]
  try:
    try:
      from aunet_jax import config as config_lib
    except ImportError as error:
      print(
        f"launch: warning: the config is not checked here ({error}).",
        file=sys.stderr,
      )
      for name in ("train", "heldout"):
        paths += paths_of(values.get(f"--config.data.{name}", ""))
      check_paths(paths, args.bucket, args.requirements)
      if args.devices != args.job_devices:
        raise ValueError(
          "choosing a mesh for other devices needs the package here: "
          "pip install -e ."
        ) from None
      return 0
    settings = [
      flag for flag in flags if flag.split("=")[0].startswith("--config")
    ]
    config = config_lib.parse_flags(settings)
    paths += paths_of(config.data.train) + paths_of(config.data.heldout)
    check_paths(paths, args.bucket, args.requirements)
    check_cache(values["--workdir"], config.data.cache_dir)
    if args.devices:
      for flag in mesh_flags(
        config, args.job_devices, args.devices, args.slices
      ):
        print(flag)
  except (ValueError, OSError) as error:
    print(f"launch: error: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))

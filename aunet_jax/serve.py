"""Serves a web page and an API that generate with a trained AU-Net."""

import argparse
import sys
from collections.abc import Sequence

from aunet_jax import terminal
from aunet_jax.generate.generator import Generator
from aunet_jax.generate.server import make_server


@terminal.command
def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m aunet_jax.serve",
    description="A web page that writes with a trained AU-Net, and an "
    "OpenAI-compatible /v1/completions and /v1/chat/completions, for programs "
    "on this machine.",
    allow_abbrev=False,
  )
  parser.add_argument("--workdir", required=True)
  parser.add_argument(
    "--port", type=int, default=8000, help="0 = any free port"
  )
  parser.add_argument("--int8", action="store_true")
  parser.add_argument(
    "--host",
    action="append",
    default=[],
    metavar="NAME",
    help="also accept this host name, for a proxy on this machine; may be "
    "given again",
  )
  terminal.add_trust_rules(parser)
  args = parser.parse_args(argv)
  generator = Generator.from_workdir(
    args.workdir, int8=args.int8, trust_rules=args.trust_rules
  )
  with make_server(generator, args.port, args.host) as server:
    print(f"http://127.0.0.1:{server.server_port}/  (Ctrl-C ends)", flush=True)
    try:
      server.serve_forever()
    except KeyboardInterrupt:
      print()
  return 0


if __name__ == "__main__":
  sys.exit(main())

"""The command `serve`: how it starts, and how it ends."""

import socket

import jax
import jax.numpy as jnp
import pytest

from aunet_jax import serve
from aunet_jax.config import Config
from aunet_jax.generate import server as server_lib
from aunet_jax.workdir import load
from tests.toy_generator import make_config, make_params


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  path = tmp_path_factory.mktemp("model")
  config = make_config()
  params = jax.tree.map(jnp.asarray, make_params(config))
  load.save_params(path, Config(model=config), params)
  return path


def test_it_says_where_it_is_and_ends_with_ctrl_c(workdir, monkeypatch, capsys):
  def serve_forever(server):
    assert server.hosts >= {"localhost", "proxy.example"}
    assert server.generator.config == make_config()
    raise KeyboardInterrupt

  monkeypatch.setattr(server_lib.Server, "serve_forever", serve_forever)
  flags = ["--port=0", "--host=Proxy.example"]
  assert serve.main([f"--workdir={workdir}", *flags]) == 0
  assert capsys.readouterr().out.startswith("http://127.0.0.1:")


def test_what_cannot_be_served_is_one_line(workdir, tmp_path, capsys):
  assert serve.main([f"--workdir={tmp_path}"]) == 2
  assert capsys.readouterr().err.startswith("error: ")
  assert serve.main([f"--workdir={workdir}", "--port=70000"]) == 2
  assert "port=70000" in capsys.readouterr().err
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    assert serve.main([f"--workdir={workdir}", f"--port={port}"]) == 1
  assert "error: " in capsys.readouterr().err

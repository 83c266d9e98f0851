"""compile: its last line, its help, and its errors."""

import json

import jax
import pytest

from aunet_jax.compile import __main__ as compile_main
from aunet_jax.compile import programs
from aunet_jax.compile import report as report_lib
from aunet_jax.train import step
from tests.compile.test_programs import run_cli


def test_the_last_line_is_json(capsys):
  status, out, _ = run_cli(capsys, "--json", "--config.mesh.fsdp=8")
  assert status == 0
  result = json.loads(out.splitlines()[-1])
  assert result["fits"] and result["devices"] == 8
  assert result["command"].startswith("python -m aunet_jax.compile --config=")
  assert result["versions"]["jax"] == jax.__version__
  assert result["programs"]["train"]["compile_seconds"] >= 0


def test_what_does_not_fit_is_said_with_what_to_try(capsys, monkeypatch):
  monkeypatch.setattr(report_lib.devices, "memory_limit", lambda device: 1e5)
  status, out, err = run_cli(capsys, "--json", "--config.mesh.fsdp=8")
  assert status == 1 and "does not fit" in err
  assert "DOES NOT FIT" in out and "mesh.tensor" in out and "remat" in out
  program = json.loads(out.splitlines()[-1])["programs"]["train"]
  assert not program["fits"] and program["memory"]["margin"] < 0


def test_a_late_error_is_one_line(capsys, monkeypatch):
  def refuse(*arguments):
    raise ValueError("stage 1: attention='splash' needs tpu devices.")

  monkeypatch.setattr(step, "compile_step", refuse)
  status, out, err = run_cli(capsys, "--config.mesh.fsdp=8")
  assert status == 2 and out == "" and "Traceback" not in err
  assert err.splitlines()[-1].startswith("error: stage 1: attention=")


def test_help_tells_how_to_call_it(capsys):
  with pytest.raises(SystemExit):
    compile_main.main(["--help"])
  assert "--topology=v5e:4x4" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("args", "words"),
  [
    (["--config.mesh.fsdp=3"], ["fsdp", "3", "8"]),
    (["--config.mesh.fspd=8"], ["mesh.fsdp"]),
    (
      [
        "--config.mesh.fsdp=8",
        "--config.model.stages[0].dim=36",
        "--config.model.stages[0].head_dim=18",
      ],
      ["mesh.fsdp=8", "36", "divide"],
    ),
    (["--rows=0"], ["--rows=0", "positive"]),
    (["--slices=2"], ["--slices", "--topology"]),
    (["--topology=h100:x"], ["h100:N"]),
    (["--config.train.grad_accumulation=2"], ["batch_size"]),
    (["--picture=x.svg"], ["--time"]),
    (["--time", "--picture=x.gif"], ["x.gif", ".svg"]),
    (["--time", "--picture=/no/such/x.svg"], ["/no/such/x.svg", "directory"]),
  ],
)
def test_bad_input_is_named(args, words, capsys):
  status, out, err = run_cli(capsys, *args)
  assert status == 2 and out == "" and err.startswith("error: ")
  for word in words:
    assert word in err


def test_a_missing_tpu_compiler_names_the_extra(capsys, monkeypatch):
  def missing(**options):
    raise RuntimeError("JAX TPU support not installed; cannot generate TPU …")

  monkeypatch.setattr(programs.topologies, "get_topology_desc", missing)
  status, _, err = run_cli(capsys, "--topology=v5e:4x4")
  assert status == 2 and "pip install -e '.[tpu]'" in err
  status, _, err = run_cli(capsys, "--topology=h100:8")
  assert status == 2 and "pip install -e '.[cuda]'" in err

"""What the command line of `scaling` takes, and that its help teaches."""

import pytest

from aunet_jax.scaling import arguments


@pytest.fixture
def parser():
  return arguments.parser("studies")


@pytest.mark.parametrize(
  "command, shows",
  [
    ("plan", "--budgets"),
    ("run", "--jobs"),
    ("hp", "--case='narrow: model.stages[0].dim=64"),
    ("coords", "--widths=64,128,256,512"),
    ("fit", "--drop_highest=5"),
    ("plot", "report.html"),
  ],
)
def test_every_command_explains_itself(parser, command, shows, capsys):
  with pytest.raises(SystemExit) as stop:
    parser.parse_args([command, "--help"])
  assert stop.value.code == 0
  assert shows in capsys.readouterr().out


@pytest.mark.parametrize(
  "args, says",
  [
    (["coords", "--widths=64"], "give two widths or more"),
    (["coords", "--widths=64,x"], "must be whole numbers"),
    (["coords", "--widths=64,0"], "must be whole numbers"),
    (["hp", "--seeds=0"], "must be a whole number from 1"),
  ],
)
def test_what_cannot_be_is_named(parser, args, says, capsys):
  with pytest.raises(SystemExit):
    parser.parse_known_args(args)
  assert says in capsys.readouterr().err


def test_widths_are_sorted_and_each_once(parser):
  args = parser.parse_args(["coords", "--widths=128,64,128"])
  assert args.widths == [64, 128]

"""fit_entropy: what cannot be done is said, before much is read."""

import pytest

from aunet_jax import fit_entropy
from aunet_jax.data import sources


@pytest.mark.parametrize(
  "args, message",
  [
    (["--workdir=no_such_run", "--data=python"], "no_such_run"),
    (["--workdir=x", "--data=no_such_file"], "matches no file"),
    (["--workdir=x", "--data=python", "--bytes_per_segment=1"], "above 1"),
    (["--workdir=x", "--data=python", "--separator="], "cannot separate"),
  ],
)
def test_what_cannot_be_done_is_said(tmp_path, args, message, capsys):
  code = fit_entropy.main([*args, f"--output={tmp_path / 'out'}"])
  assert code == 2 and message in capsys.readouterr().err
  assert not (tmp_path / "out").exists()


def test_only_as_many_files_as_are_needed_are_read(
  tmp_path, monkeypatch, capsys
):
  for number in range(5):
    lines = ['{"body": "a document of some length"}', "not JSON"]
    (tmp_path / f"{number}.jsonl").write_text("\n".join(lines))
  seen = []

  def stop(workdir, **others):
    raise ValueError("no model here")

  def model_reads(source, *others):
    seen.append(source.path)
    return read(source, *others)

  read = sources.read_source
  monkeypatch.setattr(sources, "read_source", model_reads)
  monkeypatch.setattr(fit_entropy.load, "load", stop)
  flags = ["--workdir=x", f"--data={tmp_path}", f"--output={tmp_path / 'out'}"]
  code = fit_entropy.main([*flags, "--text_field=body", "--max_bytes=30"])
  said = capsys.readouterr().err
  assert code == 2 and "no model here" in said
  assert len(seen) == 2  # 25 bytes in each
  assert "0.jsonl:2: malformed JSON" in said  # and is reported

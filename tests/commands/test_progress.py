"""The newest step and checkpoint of a workdir, as launch scripts ask."""

from aunet_jax import progress
from aunet_jax.workdir import layout


def test_it_tells_the_newest_step_and_checkpoint(tmp_path, capsys):
  assert progress.main([f"--workdir={tmp_path}"]) == 0
  (tmp_path / layout.METRICS_FILE).write_text('{"step": 7}\n{"step": 12}\n{"s')
  for step in ("5", "10", "damaged-12"):
    (tmp_path / layout.CHECKPOINTS / step).mkdir(parents=True)
  assert progress.main([f"--workdir={tmp_path}"]) == 0
  assert capsys.readouterr().out == (
    "step 0 checkpoint 0\nstep 12 checkpoint 10\n"
  )
  assert progress.main(["--workdir=s3://bucket/x"]) == 2


def test_it_tells_them_of_a_bucket(bucket, capsys):
  bucket.put("x/metrics.jsonl", b'{"step": 7}\n')
  bucket.put("x/checkpoints/5/commit_success.txt", b"")
  bucket.put("x/checkpoints/6/params/a", b"")  # not committed
  assert progress.main(["--workdir=gs://bucket/x"]) == 0
  assert capsys.readouterr().out == "step 7 checkpoint 5\n"

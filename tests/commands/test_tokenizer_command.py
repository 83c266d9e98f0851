"""tokenizer: what cannot be made, and what was skipped."""

import pytest

from aunet_jax import tokenizer


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--vocab_size=255"], "must hold the 256 bytes"),
    (["--vocab_size=100000"], "fewer than --vocab_size"),
    (["--max_bytes=0"], "--max_bytes=0"),
    (["--data=/no/such"], "/no/such"),
    (["--separator="], "cannot separate"),
  ],
)
def test_a_tokenizer_that_cannot_be_made_says_why(
  tmp_path, capsys, flags, message
):
  (tmp_path / "words.txt").write_text("some words and some more words")
  flags = [
    f"--data={tmp_path / 'words.txt'}",
    f"--output={tmp_path / 't.json'}",
    *flags,
  ]
  assert tokenizer.main(flags) == 2
  assert message in capsys.readouterr().err
  assert not (tmp_path / "t.json").exists()


def test_what_was_skipped_is_reported_and_the_field_is_a_choice(
  tmp_path, capsys
):
  lines = ['{"body": "some words and some more words"}', "not JSON", '{"a": 1}']
  (tmp_path / "a.jsonl").write_text("\n".join(lines))
  code = tokenizer.main(
    [
      f"--data={tmp_path / 'a.jsonl'}",
      f"--output={tmp_path / 't.json'}",
      "--text_field=body",
      "--vocab_size=257",
    ]
  )
  said = capsys.readouterr().err
  assert code == 0
  assert "a.jsonl:2: malformed JSON" in said
  assert "skipped in all: 1 malformed JSON, 1 no text field" in said

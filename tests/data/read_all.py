"""What the readers of sources make of a path, for their tests."""

from aunet_jax.data import sources


def read_all(path, field="text"):
  """(texts, skips) of everything that a path names."""
  files, skips = sources.list_sources(str(path))
  texts = []
  for file in files:
    for record in sources.read_source(file, field):
      if isinstance(record, sources.Skip):
        skips.append(record)
      else:
        texts.append(record.text)
  return texts, skips

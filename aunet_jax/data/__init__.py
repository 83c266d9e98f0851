"""Files to packed rows to batches; texts to rows.

Read `corpora.py` first, then `packing.py`.
"""

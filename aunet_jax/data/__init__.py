"""Turns files into packed rows and batches, and texts into rows.

Read `corpora.py` first, then `packing.py`.
"""

"""Converts official checkpoints, both ways.

Read `lingua.py` first, then `checkpoint.py`; `__main__.py` is the command.
"""

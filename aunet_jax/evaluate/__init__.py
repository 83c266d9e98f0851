"""Scores given text under a trained model.

Read `bits_per_byte.py` first; `__main__.py` is the command.
"""

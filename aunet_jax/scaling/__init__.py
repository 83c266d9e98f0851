"""Compares models at equal compute.

Read `plan.py` first, then `analysis.py`; `__main__.py` is the command.
"""

"""Prompt to text.

Read `generator.py` first, then `decode.py`; `__main__.py` is the command.
"""

"""What a run will need, before it runs.

Read `programs.py` first; `__main__.py` is the command.
"""

"""Other people's checkpoints, both ways.

Read `lingua.py` first; `__main__.py` is the command.
"""

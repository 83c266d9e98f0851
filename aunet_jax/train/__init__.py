"""The step, the loop, set-up and resume.

Read `step.py` first, then `loop.py`; `__main__.py` is the command.
"""

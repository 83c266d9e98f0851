"""What a trained model says of given text.

Read `bits_per_byte.py` first; `__main__.py` is the command.
"""

"""Generates text after a prompt.

Read `generator.py` first, then `decode.py`; `__main__.py` is the command, and
`server.py` is what `aunet_jax/serve.py` starts.
"""

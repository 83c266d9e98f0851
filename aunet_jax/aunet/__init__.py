"""The network: a whole row at once, or one position at a time.

Read `network.py` first; it follows the paper's figure.
"""

from aunet_jax.aunet.network import AUNet

__all__ = ["AUNet"]

"""The public, stable name of `aunet_jax.convert.lingua`."""

from aunet_jax.convert.lingua import from_lingua, to_lingua

__all__ = ["from_lingua", "to_lingua"]

"""Multi-head latent attention: paged decode, prefill and training, after FlashMLA."""

from jax_ds.flash_mla.api import append, decode, explain, prefill

__all__ = ["append", "decode", "explain", "prefill"]

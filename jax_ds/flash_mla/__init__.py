"""Multi-head latent attention: paged decode, prefill and training, after FlashMLA."""

from jax_ds.flash_mla.api import append, decode, prefill

__all__ = ["append", "decode", "prefill"]

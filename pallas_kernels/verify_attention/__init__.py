"""Attention of a few new positions a row against a ragged KV cache."""

from pallas_kernels.verify_attention.api import verify_attention

__all__ = ["verify_attention"]

"""Judging drafted tokens by the target's logits, and drawing the token that follows the accepted ones."""

from pallas_kernels.rejection_sampling.api import Verdict, draw, process_logits, rejection_sampling

__all__ = ["Verdict", "draw", "process_logits", "rejection_sampling"]

"""Judging drafted tokens by the target's logits, and drawing the token that follows the accepted
ones."""

from pallas_kernels.rejection_sampling.api import Verdict, draw, process_logits, rejection_sampling
from pallas_kernels.rejection_sampling.processing import divisor, is_cut, scaled, scaled_logprobs

__all__ = ["Verdict", "divisor", "draw", "is_cut", "process_logits", "rejection_sampling",
           "scaled", "scaled_logprobs"]

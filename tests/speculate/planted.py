"""Bugs that systems shipped. The statistical tests must see each of them: that is their power."""

import jax.numpy as jnp
import pytest

from pallas_kernels.rejection_sampling import reference

_REJECTION, _RESIDUAL = reference._rejection, reference.residual
EPSILON = 0.03


def _shared_noise(log_p, drafts, log_q, noise, *vocab):
    """A draft is judged by the uniform that drew it."""
    return _REJECTION(log_p, drafts, log_q, noise.replace(accept=noise.draft[..., 1]), *vocab)


def _epsilon(log_p, drafts, log_q, noise, *vocab):
    """p / (q + epsilon)."""
    return _REJECTION(log_p, drafts, jnp.log(jnp.exp(log_q) + EPSILON), noise, *vocab)


def _swapped_ratio(log_p, drafts, log_q, noise, *vocab):
    """q / p in place of p / q, the residual being right."""
    k = drafts.shape[1]
    ratio = reference._pick(log_q, drafts) - reference._pick(log_p[:, :k], drafts)
    # an acceptance uniform that makes the true comparison come out as the swapped one would
    accept = jnp.where(jnp.log(noise.accept) < ratio, 0.0, 1.0)
    return _REJECTION(log_p, drafts, log_q, noise.replace(accept=accept), *vocab)


def _bonus_from_residual(log_p, drafts, log_q, noise, *vocab):
    """After K acceptances the last draft's q is subtracted all the same."""
    accepted, tokens = _REJECTION(log_p, drafts, log_q, noise, *vocab)
    drawn = reference.inverse_transform(_RESIDUAL(log_p[:, -1], log_q[:, -1]), noise.residual)
    return accepted, tokens.at[:, -1].set(jnp.where(accepted == drafts.shape[1], drawn, tokens[:, -1]))


def _residual_is_p(log_p, log_q):
    """A refused token may be drawn again."""
    return jnp.exp(log_p)


BUGS = {"shared noise": ("_rejection", _shared_noise),
        "epsilon in the ratio": ("_rejection", _epsilon),
        "swapped ratio": ("_rejection", _swapped_ratio),
        "bonus from the residual": ("_rejection", _bonus_from_residual),
        "residual is p": ("residual", _residual_is_p)}

DEFAULT = ("shared noise", "epsilon in the ratio", "residual is p")  # the others are marked slow

each_bug = pytest.mark.parametrize(
    "bug", [pytest.param(x, marks=() if x in DEFAULT else pytest.mark.slow) for x in BUGS])


def plant(monkeypatch, bug):
    monkeypatch.setattr(reference, *BUGS[bug])

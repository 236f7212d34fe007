"""Bugs that systems shipped. The statistical tests must see each of them: that is their power."""

import jax.numpy as jnp
import pytest

from pallas_kernels.rejection_sampling import reference

_REJECTION, _RESIDUAL = reference._rejection, reference.residual
_LEFT = reference.block_left
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
    return (accepted,
            tokens.at[:, -1].set(jnp.where(accepted == drafts.shape[1], drawn, tokens[:, -1])))


def _residual_is_p(log_p, log_q, weight):
    """A refused token may be drawn again."""
    return jnp.exp(log_p)


def _unweighted_residual(log_p, log_q, weight):
    """Rejection's residual, (p - q)+."""
    return _RESIDUAL(log_p, log_q)


def _unweighted_left(log_p, draft_tokens, draft_log_q, draft_vocab, weights):
    """Each test by the mass of (p - q)+."""
    return _LEFT(log_p, draft_tokens, draft_log_q, draft_vocab, jnp.ones_like(weights))


def _uncapped(ratio):
    """w = the product of the ratios, with one min at the end in place of one at each step."""
    product = jnp.cumprod(jnp.exp(ratio), 1)
    return jnp.minimum(jnp.pad(product, ((0, 0), (1, 0)), constant_values=1.0), 1.0)


def _chance_by_weight(weights, left):
    """h_i = w_i, which is right for the last draft alone."""
    return weights[:, 1:]


# bug: (rule, what of the reference it takes the place of, and with what)
BUGS = {"shared noise": ("rejection", "_rejection", _shared_noise),
        "epsilon in the ratio": ("rejection", "_rejection", _epsilon),
        "swapped ratio": ("rejection", "_rejection", _swapped_ratio),
        "bonus from the residual": ("rejection", "_rejection", _bonus_from_residual),
        "residual is p": ("rejection", "residual", _residual_is_p),
        "block: residual without its weight": ("block", "residual", _unweighted_residual),
        "block: stops at the first failure": ("block", "last_true", reference.leading),
        "block: tests without their weight": ("block", "block_left", _unweighted_left),
        "block: weights capped at the end only": ("block", "block_weights", _uncapped),
        "block: every test is the last one's": ("block", "block_chances", _chance_by_weight)}

DRAFT = {"rejection": "table", "block": "sharp"}
"""With which of `drafters.TABLES` a rule's bugs show: a draft refused that p likes more than q
does, after one that it likes less, is what the block rule's weight is for, and it takes a sharp
q."""

# the others are marked slow
DEFAULT = ("shared noise", "residual is p", "block: residual without its weight")

each_bug = pytest.mark.parametrize(
    "bug", [pytest.param(x, marks=() if x in DEFAULT else pytest.mark.slow) for x in BUGS])


def plant(monkeypatch, bug):
    """Returns the rule that has the bug."""
    rule, name, wrong = BUGS[bug]
    monkeypatch.setattr(reference, name, wrong)
    return rule

"""The optimizers of policy and draft."""

from __future__ import annotations

from typing import Any

import jax
import optax

from jspec.rl.update_settings import UpdateSettings


def optimizers(settings: UpdateSettings) -> tuple[optax.GradientTransformation,
                                                  optax.GradientTransformation]:
    """The policy's AdamW and the draft's own, each behind a global-norm clip of its own."""
    rate = settings.learning_rate
    if settings.warmup_steps:
        by_step = warmup(rate, settings.warmup_steps)
        rate = lambda updates: by_step(updates // settings.updates_per_step)  # noqa: E731
    policy = optax.chain(optax.clip_by_global_norm(settings.clip),
                         optax.adamw(rate, weight_decay=settings.weight_decay))
    return policy, draft_optimizer(settings.draft_optimizer, settings.draft_learning_rate,
                                   settings.draft_clip)


def warmup(rate: float, steps: int) -> optax.Schedule:
    """The learning rate of step 0, 1, ...: rate / steps, 2 rate / steps, ..., and `rate` from the
    `steps`-th step on. The first step already moves."""
    return optax.linear_schedule(rate / steps, rate, steps - 1)


def draft_optimizer(name: str, rate: optax.ScalarOrSchedule,
                    clip: float) -> optax.GradientTransformation:
    """The draft's own: "adamw", or "muon" (https://kellerjordan.github.io/posts/muon/), whose
    updates of the matrices inside decoder blocks are scaled to AdamW's size, so that the same
    learning rates suit both; as in the post, what leads into the blocks and out of them
    (projections, embeddings, the output head) and all vectors stay on AdamW."""
    if name == "adamw":
        rule = optax.adamw(rate, weight_decay=0.0)
    else:
        rule = optax.contrib.muon(rate, consistent_rms=0.2,
                                  muon_weight_dimension_numbers=inside_blocks)
    return optax.chain(optax.clip_by_global_norm(clip), rule)


def inside_blocks(weights: Any) -> Any:
    """For each of a draft's weights what `optax.contrib.muon` asks of a matrix inside a decoder
    block (`layer_specs`, under the name `layer`), and None for all else."""
    def dimensions(path, x) -> Any:
        within = any(getattr(entry, "key", None) == "layer" for entry in path)
        # [out, in]
        return optax.contrib.MuonDimensionNumbers(1, 0) if within and x.ndim == 2 else None

    return jax.tree_util.tree_map_with_path(dimensions, weights)

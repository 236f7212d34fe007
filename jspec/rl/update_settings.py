"""What an update needs to know, and what follows from it for a draft."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jspec.choices import AdvantageForm, Aggregation, Remat
from jspec.config import Config
from jspec.drafts import Draft
from jspec.rl.objectives import Limits, Objective, find, grpo
from pallas_kernels.rejection_sampling import process_logits


@dataclasses.dataclass(frozen=True)
class Cut:
    """Which unlikely tokens were cut off when answers were drawn, as in `Sampling`."""

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def kept(self, logits: jax.Array, temperature: jax.Array) -> jax.Array:
        """The ids that are left of logits [..., V], bool; no gradient goes through it."""
        top_p, min_p = (None if value == off else value
                        for value, off in ((self.top_p, 1.0), (self.min_p, 0.0)))
        return process_logits(jax.lax.stop_gradient(logits), temperature, top_p,
                              top_k=self.top_k, min_p=min_p) > -jnp.inf

    @classmethod
    def of(cls, config: Config) -> Cut | None:
        """What a run's updates take into account; None: nothing is cut off, or it is not to be."""
        sampling = config.sampling
        cut = cls(sampling.top_k, sampling.top_p, sampling.min_p)
        whole = cut == cls() or sampling.temperature == 0 or not config.grpo.truncated_ratio
        return None if whole else cut


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """An optimizer and its learning rate's schedule; `jspec.optimizer_sections` says what each
    means."""

    optimizer: str = "adamw"
    learning_rate: float = 1e-6
    clip: float = 1.0
    weight_decay: float = 0.0
    b1: float | None = None
    b2: float | None = None
    eps: float | None = None
    momentum: float | None = None
    state_dtype: str = "float32"
    state_memory: str = "device"
    schedule: str = "constant"
    warmup_steps: int = 0
    decay_steps: int | None = None
    end_learning_rate: float = 0.0


def optimizer_settings(section: Any, steps: int | None = None) -> dict[str, Any]:
    """The fields of `OptimizerSettings` that a section of a configuration has; steps: the run's."""
    given = {field.name: getattr(section, field.name)
             for field in dataclasses.fields(OptimizerSettings) if hasattr(section, field.name)}
    return given | {"decay_steps": given.get("decay_steps") or steps}


@dataclasses.dataclass(frozen=True)
class UpdateSettings(Limits, OptimizerSettings):
    """What an update needs to know and what is fixed for a run, and the policy's optimizer;
    `jspec.config` says what each of them means."""

    temperature: float = 1.0
    cut: Cut | None = None
    objective: Objective = grpo
    aggregation: Aggregation = "token_mean"
    constant_length: int | None = None
    advantage: AdvantageForm = "group"
    kl_weight: float = 0.0
    kl_estimate: str = "k3"
    kl_in_reward: bool = False
    kl_reference_every: int = 0
    kl_reference_mix: float = 1.0
    entropy_weight: float = 0.0
    correction: str = "none"
    correction_bounds: tuple[float, float] = (0.0, 0.0)
    mask_truncated: bool = False
    updates_per_rollout: int = 1
    mini_batches: int = 1
    replay_routes: bool = True
    micro_batch: int = 0
    widths: tuple[int, ...] = ()
    remat: bool | Remat = False
    train_draft: bool = True
    draft_every: int = 1
    draft_features: str = "update"
    draft_loss: str = "kl"
    draft_optimizer: OptimizerSettings = OptimizerSettings(learning_rate=1e-3)

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps on a rollout and all its parts."""
        return self.updates_per_rollout * self.mini_batches

    @property
    def moves_state(self) -> bool:
        """Whether the state of an optimizer lies in host memory between updates."""
        return "host" in (self.state_memory, self.draft_optimizer.state_memory)

    @property
    def rescores(self) -> bool:
        """Whether a step computes its own log-probabilities before its first update: that one's
        are what a correction asks for, and there are others after it."""
        return self.correction != "none" and self.updates_per_step > 1

    @classmethod
    def of(cls, config: Config) -> UpdateSettings:
        """The settings that a run's configuration gives."""
        grpo, draft = config.grpo, config.draft
        same = ("clip_low", "clip_high", "dual_clip", "sapo_tau", "constant_length", "kl_weight",
                "kl_estimate", "kl_in_reward", "kl_reference_every", "kl_reference_mix",
                "entropy_weight", "correction", "correction_bounds", "mini_batches",
                "mask_truncated", "updates_per_rollout", "replay_routes", "micro_batch", "widths")
        advantage, aggregation = grpo.chosen()
        return cls(objective=find(grpo.objective), advantage=advantage, aggregation=aggregation,
                   temperature=config.sampling.temperature, cut=Cut.of(config),
                   remat=config.model.remat,
                   train_draft=draft.trains, draft_every=draft.every_n_steps,
                   draft_features=draft.features, draft_loss=draft.loss,
                   draft_optimizer=OptimizerSettings(**optimizer_settings(draft, config.steps)),
                   **optimizer_settings(grpo, config.steps),
                   **{name: getattr(grpo, name) for name in same})


def trains_draft(draft: Draft | None, settings: UpdateSettings) -> bool:
    """Whether there is a draft with a loss, and it is to be trained."""
    return draft is not None and settings.train_draft and draft.drafter.loss is not None


def learned_from(draft: Draft | None, settings: UpdateSettings) -> tuple[int, ...] | None:
    """The features that a rollout keeps (`Speculation.depths`) for `update_draft`; None: nothing
    learns from it."""
    if not trains_draft(draft, settings) or settings.draft_features == "update":
        return None
    return draft.drafter.features(draft.config)


def draft_due(settings: UpdateSettings, updates: jax.Array | int) -> jax.Array | bool:
    """Whether this update is of a step that trains the draft: the first, and every `draft_every`-th
    after it."""
    return updates // settings.updates_per_step % settings.draft_every == 0

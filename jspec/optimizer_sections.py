"""Keys of an optimizer and of its learning rate's schedule, by optax's names: what the sections of
policy and draft share."""

import dataclasses
from typing import Any

from jspec.choices import DTYPES, OPTIMIZERS, SCHEDULES
from jspec.errors import InputError
from jspec.settings import setting


@dataclasses.dataclass(frozen=True)
class OptimizerSection:
    """How a gradient changes weights."""

    optimizer: str = setting("adamw", "its update rule; muon: orthogonal updates of the matrices "
                             "inside layers, of AdamW's size, and AdamW for the rest",
                             choices=tuple(OPTIMIZERS))
    learning_rate: float = setting(1e-6, "the highest that the schedule comes to", low=0,
                                   often=True)
    clip: float = setting(1.0, "global-norm clip of the gradient", above=0)
    weight_decay: float = setting(0.0, "decoupled weight decay; sgd's is added to the gradient",
                                  low=0)
    b1: float | None = setting(None, "decay of the first moment; null: optax's own, 0.9", low=0,
                               below=1)
    b2: float | None = setting(None, "of the second moment, 0.999; lion: of its one moment, 0.99",
                               low=0, below=1)
    eps: float | None = setting(None, "added where the update divides; null: 1e-8", above=0)
    momentum: float | None = setting(None, "sgd: of its updates; null: none, and nothing is kept; "
                                     "muon: of its matrices'; null: 0.95", low=0, below=1)
    state_dtype: str = setting("float32", "what first moments and momentum are kept in. Second "
                               "moments stay float32: in bfloat16 a step of 1 - b2 = 0.001 is "
                               "rounded away", choices=DTYPES)


@dataclasses.dataclass(frozen=True)
class StateMemorySection:
    """Where an optimizer keeps its state."""

    state_memory: str = setting("device", "where its state lies between updates. host: the device "
                                "memory is the rollout's meanwhile, and the state goes over the "
                                "link to the host and back at every step",
                                choices=("device", "host"))


@dataclasses.dataclass(frozen=True)
class ScheduleSection:
    """How a learning rate rises and falls."""

    schedule: str = setting("constant", "of the learning rate after its warm-up: constant, or it "
                            "falls by a cosine or a line", choices=SCHEDULES)
    warmup_steps: int = setting(0, "GRPO steps over which the learning rate rises linearly; the "
                                "first one already moves", low=0)
    decay_steps: int | None = setting(None, "GRPO steps until it has fallen, the warm-up among "
                                      "them; null: the run's steps, so that more steps stretch it",
                                      low=1)
    end_learning_rate: float = setting(0.0, "what it falls to, and then stays at", low=0)


def check_optimizer(name: str, section: Any) -> None:
    """Raise InputError for keys of an optimizer that its rule does not have."""
    used = OPTIMIZERS[section.optimizer]
    for key in ("b1", "b2", "eps", "momentum"):
        if getattr(section, key) is not None and key not in used:
            raise InputError(f"{name}.{key} is set, and {name}.optimizer={section.optimizer} has "
                             f"only {', '.join(used)}; leave it out")


def check_schedule(name: str, section: Any, steps: int) -> None:
    """Raise InputError for a schedule that never falls, or has no time to."""
    falls, end = section.schedule != "constant", section.decay_steps or steps
    for key, unset in (("decay_steps", None), ("end_learning_rate", 0.0)):
        if not falls and getattr(section, key) != unset:
            raise InputError(f"{name}.{key} is of a learning rate that falls, and "
                             f"{name}.schedule=constant does not; set it to "
                             f"{' or '.join(SCHEDULES[1:])}, or leave {key} out")
    if falls and end <= section.warmup_steps:
        raise InputError(f"{name}.schedule={section.schedule} falls after {name}.warmup_steps="
                         f"{section.warmup_steps} until step {end} "
                         f"({f'{name}.decay_steps' if section.decay_steps else 'steps'}), which is "
                         "no later; warm up over fewer")
    if falls and section.end_learning_rate > section.learning_rate:
        raise InputError(f"{name}.end_learning_rate={section.end_learning_rate:g} is above "
                         f"{name}.learning_rate={section.learning_rate:g}, from which it falls")

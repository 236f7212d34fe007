"""Whether a step fits chips that are not here, and the least it can take there, from a configuration alone.

The step's own programs go through the chip's own compiler. What is unrolled over the layers, the rollout and the reshard
before it, is compiled at two small depths, whose figures go on in a straight line; what scans them, at full depth.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of the step, at full depth.

    Attributes:
      resident: bytes of what lies beside it and is not its argument. bytes: its own.
      kinds: bytes by kind, of both; the compiler's temporaries are what no kind explains.
      layers: those that were compiled. refused: the compiler refused it for want of memory.
    """

    name: str
    resident: int
    bytes: int
    kinds: dict[str, int]
    floors: Floors
    layers: tuple[int, ...]
    refused: bool
    seconds: float

    @property
    def needed(self) -> int:
        """On the device while it runs."""
        return self.resident + self.bytes

def of_rollout(subject: Subject) -> tuple[list[Program], Pools, Any]:
    """(the reshard and the rollout, its pools at full depth, what it gives)."""
    models = depths(subject.model)
    whole = Declared.of(subject, subject.model)
    reshards, rollouts = [], []
    for model in models:
        made = whole if model == subject.model else Declared.of(subject, model)
        with telling(f"compiling the reshard and the rollout of {model.num_layers} layers"):
            reshard = compile_one(subject, "reshard", made.step.reshard, (made.state.policy,), once)
            if reshard.refused:
                raise InputError(f"not even {model.num_layers} layers of this configuration fit {subject.topology.name}: "
                                 f"its reshard takes {reshard.bytes / 2**30:.1f} GiB a device")
            pools = pools_of(subject, made)
            arguments = (reshard.made, made.state.draft, made.prompts, made.step.sampling, subject.k)
            rollout = compile_one(subject, "rollout", made.step.rollout, arguments, once, pools.is_pool)
        reshards.append(reshard)
        rollouts.append(rollout)
    pools = pools_of(subject, whole)
    out = answers(subject, whole, rollouts[-1], made, reshard.made)
    state, draft = state_bytes(whole.state, whole.reference), whole.state.draft
    copy = shard_bytes(whole.copy)
    beside = sum(state.values()) - state["master weights"]
    programs = [assembled(subject, "reshard", models, reshards, beside, state | {"rollout copy": copy})]
    own = shard_bytes(draft) if draft is not None else 0
    of_policy, of_draft, _ = pools.bytes()
    kinds = state | {"rollout copy": copy, "KV pool": of_policy, "draft": state["draft"] + of_draft + draft_copy(whole),
                     "prompts and answers": shard_bytes((whole.prompts, out))}
    programs.append(assembled(subject, "rollout", models, rollouts, sum(state.values()) - own, kinds))
    return programs, pools, out


def of_learning(subject: Subject, out: Any) -> list[Program]:
    """What comes after the rollout, compiled at full depth; where the update is refused, what it does is counted at
    small ones."""
    whole = Declared.of(subject, subject.model)
    state = state_bytes(whole.state, whole.reference)
    kinds = state | {"prompts and answers": shard_bytes((whole.prompts, out))}
    reference, step, programs = state.get("reference", 0), whole.step, []
    if step.draft is not None:
        with telling("compiling the draft's update"):
            made = compile_one(subject, "draft", step.draft, (whole.state, whole.prompts, out), once)
        programs.append(assembled(subject, "draft", [subject.model], [made], reference, kinds))
    out = out.replace(trunk=None)
    if step.remember is not None:
        with telling("compiling what the draft remembers"):
            made = compile_one(subject, "remember", step.remember, (whole.state.draft, whole.prompts, out), once)
        beside = sum(state.values()) - shard_bytes(whole.state.draft)
        programs.append(assembled(subject, "remember", [subject.model], [made], beside, kinds))
    kinds = state | {"prompts and answers": shard_bytes((whole.prompts, out))}
    with telling(f"compiling the update of {subject.model.num_layers} layers"):
        update = compile_update(subject, whole, out)
    program = assembled(subject, "update", [subject.model], [update], 0, kinds)
    models = depths(subject.model)
    if update.refused and len(models) > 1:
        with telling("compiling the update of a few layers, to count what it does"):
            few = [compile_update(subject, Declared.of(subject, model), shallow_answers(out, model)) for model in models]
        if not any(one.refused for one in few):
            program = dataclasses.replace(program, floors=extended_floors(subject.model, models, few),
                                          seconds=program.seconds + sum(one.seconds for one in few))
    return [*programs, program]

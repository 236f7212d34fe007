"""What `jspec rollout`, `jspec eval`, `jspec export` and `jspec draft export` do."""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

import jspec
from jspec.checkpoint import load_run
from jspec.config import Config, load_config
from jspec.console import PlainConsole
from jspec.drafts import Draft
from jspec.errors import InputError
from jspec.heads import publish, shipped
from jspec.hub.names import hub_id
from jspec.model import Policy
from jspec.prepare import (
    EVAL_KEY,
    make_policy,
    make_sampling,
    make_speculation,
    make_tokenizer,
    purpose_key,
    with_tokenizer,
)
from jspec.progress import telling
from jspec.rl.answers import answer_text, reward_inputs
from jspec.rl.encode import encode_prompt
from jspec.rl.prompts import PromptData
from jspec.rl.rewards import RewardPool, check_reward
from jspec.settings import Override


@dataclasses.dataclass(frozen=True)
class Source:
    """A policy to look at: its tokenizer, its trained draft if it has one, and the configuration it goes with."""

    policy: Policy
    tokenizer: Any
    draft: Draft | None
    config: Config


def open_source(name: str, overrides: Sequence[Override], dtype: str | None = None) -> Source:
    """A run's output_dir (its last checkpoint), a config file, or any name that `jspec.load` takes.

    Raises InputError for what cannot be found or read.
    """
    path = Path(name)
    if (path / "checkpoints").is_dir():
        config, policy, draft = load_run(path, overrides, dtype)
        tokenizer = make_tokenizer(config)
        return Source(with_tokenizer(policy, tokenizer), tokenizer, draft, config)
    if path.suffix in (".yaml", ".yml"):
        config = load_config(path, overrides)
        if config.model.name == "random":
            raise InputError(f"{name} trains a policy drawn at random: give the output_dir of its run instead")
    else:
        config = load_config(None, [("model.name", name), *overrides])
    if dtype is not None:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
    tokenizer = make_tokenizer(config)
    return Source(make_policy(config, tokenizer), tokenizer, None, config)


@dataclasses.dataclass(frozen=True)
class Timed:
    """A finished rollout, on the host, and the seconds it took without compiling."""

    rollout: Any
    seconds: float

    @property
    def tokens(self) -> int:
        return int(self.rollout.lengths.sum())

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds


def time_rollout(policy: Policy, draft: Draft | None, batch, sampling, speculation) -> Timed:
    """Runs twice, with the clock on the second: the first one compiles."""
    how = "one token at a time" if draft is None else f"with {draft.config.name} drafts"
    for doing in ("compiling, then decoding", "timing: decoding"):
        with telling(f"{doing} {how}"):
            start = time.perf_counter()
            out = jax.block_until_ready(jspec.rollout(policy, draft, batch, sampling=sampling, speculation=speculation))
            seconds = time.perf_counter() - start
    return Timed(jax.device_get(out), seconds)


def rollout(arguments) -> int:
    """`jspec rollout`: the same prompt and seed without and with a draft, side by side."""
    console = PlainConsole()
    overrides = [(f"sampling.{key}", getattr(arguments, key))
                 for key in ("temperature", "top_k", "top_p", "max_new_tokens")]
    overrides += [(f"speculation.{name}", getattr(arguments, name)) for name in ("k", "rule", "kernels")]
    with telling(f"loading {arguments.model}"):
        source = open_source(arguments.model, overrides, arguments.dtype)
        draft = make_draft(source, arguments.draft, arguments.model)
        tokens = encode_prompt(source.tokenizer, arguments.prompt, arguments.system, not arguments.raw)
        batch = jspec.PromptBatch.from_tokens([tokens], group_size=arguments.samples, seed=arguments.seed)
        policy = jspec.reshard(source.policy)
    sampling = make_sampling(source.config)
    speculation = make_speculation(source.config)
    plain = time_rollout(policy, None, batch, sampling, speculation)
    fast = None if draft is None else time_rollout(policy, draft, batch, sampling, speculation)

    def text(timed: Timed) -> Text:
        return Text(answer_text(source.tokenizer, timed.rollout, 0))  # a model may write what looks like markup

    console.print(Panel(text(plain), title="autoregressive", title_align="left"))
    if fast is not None:
        exact = arguments.rule == "coupled" or arguments.temperature == 0
        same = f" ({compare(plain.rollout, fast.rollout)})" if exact else " (another sample of the same distribution)"
        console.print(Panel(text(fast), title=draft.config.name + same, title_align="left"))
    console.print(speed_table(plain, fast, draft, arguments.k))
    return 0


def make_draft(source: Source, name: str | None, model: str) -> Draft | None:
    """The draft asked for. Where none is named: a run's own, the one that ships for `model`, else n-gram look-up."""
    if name == "none":
        return None
    if source.draft is not None and name in (None, source.draft.config.name):
        return source.draft
    if shipped(model, name):
        return jspec.load_draft(source.policy, model)
    draft = getattr(jspec.drafts, name or "ngram")(source.policy, jax.random.key(0))
    if draft.module.loss is not None:
        print(f"jspec: this {name} draft is fresh, not trained: few of its tokens will be accepted", file=sys.stderr)
    return draft


def compare(plain, fast) -> str:
    """Whether two rollouts are the same tokens, and if not, where they part."""
    for row in range(len(plain.lengths)):
        one, other = (out.tokens[row][out.mask[row]] for out in (plain, fast))
        length = min(len(one), len(other))
        apart = np.flatnonzero(one[:length] != other[:length])
        if len(apart) or len(one) != len(other):
            return f"parts from it at token {int(apart[0]) if len(apart) else length} of answer {row}"
    return "the same tokens"


def speed_table(plain: Timed, fast: Timed | None, draft: Draft | None, k: int) -> Table:
    """Speed and acceptance side by side."""
    def accepted(timed: Timed) -> str:
        stats = timed.rollout.stats
        return "  ".join(f"{a / max(d, 1):.0%}" for a, d in zip(stats.accepted, stats.drafted, strict=True)) or "-"

    table = Table(show_edge=False)
    table.add_column("")
    columns = [("autoregressive", plain)] + ([(f"{draft.config.name}, k = {k}", fast)] if fast else [])
    for title, _ in columns:
        table.add_column(title, justify="right")
    rows = {
        "tokens": lambda t: str(t.tokens),
        "seconds, compiling excluded": lambda t: f"{t.seconds:.3g}",
        "tokens/s": lambda t: f"{t.speed:.1f}",
        "speed-up": lambda t: f"{t.speed / plain.speed:.2f}x",
        "passes over the weights": lambda t: str(int(t.rollout.stats.cycles.max())),
        "tokens a cycle": lambda t: f"{float(t.rollout.lengths.sum() / max(t.rollout.stats.cycles.sum(), 1)):.2f}",
        "accepted, by draft position": accepted,
    }
    for name, show in rows.items():
        table.add_row(name, *(show(timed) for _, timed in columns))
    return table


def evaluate(arguments) -> int:
    """`jspec eval`: samples answers to a task's prompts, grades them, and reports the mean reward."""
    console = PlainConsole(stderr=arguments.json == "-")
    overrides = list(arguments.overrides)
    if arguments.temperature is not None:
        overrides.append(("sampling.temperature", arguments.temperature))
    for name in ("prompts", "samples", "batch"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name} must be at least 1, not {getattr(arguments, name)}")
    with telling(f"loading {arguments.source}"):
        source = open_source(arguments.source, overrides)
        check_reward(source.config.reward.function, source.config.data.source)
    result = score(source, arguments.prompts, arguments.samples, arguments.batch, console)
    result = {"source": arguments.source, "overrides": arguments.overrides, **result}
    if arguments.json == "-":
        print(json.dumps(result))
    elif arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n")
    table = Table(show_edge=False, show_header=False)
    for key, value in result.items():
        if isinstance(value, int | float):
            table.add_row(key.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value))
    console.print(table)
    return 0


def score(source: Source, prompts: int, samples: int, batch: int, console: Console) -> dict[str, Any]:
    """Mean reward of `samples` answers to each of `prompts` prompts, with its standard error over prompts."""
    config, policy = source.config, jspec.reshard(source.policy)
    batch = min(batch, prompts)
    data = PromptData(dataclasses.replace(config.data, prompts_per_step=1), source.tokenizer, seed=config.seed)
    if prompts > len(data.records):
        raise InputError(f"--prompts {prompts} is more than {config.data.source} has: {len(data.records)}")
    key, sampling = purpose_key(config.seed, EVAL_KEY), make_sampling(config)
    speculation = make_speculation(config)
    rewards, lengths, finished, failures, seconds = [], [], [], 0, 0.0
    with (RewardPool(config.reward.function, config.reward.workers, config.reward.timeout_s) as pool,
          telling("answering (the first batch compiles)", total=prompts) as advance):
        for step in range(math.ceil(prompts / batch)):
            chosen = [next(data)[0] for _ in range(batch)]
            made = jspec.PromptBatch.from_tokens([p.tokens for p in chosen], group_size=samples,
                                                 seed=jax.random.fold_in(key, step))
            start = time.perf_counter()
            out = jax.device_get(jspec.rollout(policy, source.draft, made, sampling=sampling, speculation=speculation))
            seconds += time.perf_counter() - start
            graded = pool.grade(reward_inputs(source.tokenizer, chosen, out))
            keep = min(batch, prompts - step * batch)  # the last batch is filled up with prompts that are not asked for
            rewards.append(graded.rewards.reshape(batch, samples)[:keep])
            lengths.append(out.lengths.reshape(batch, samples)[:keep])
            finished.append(out.finished.reshape(batch, samples)[:keep])
            failures += sum(graded.failures.values())
            advance(keep)
            console.print(f"{min(prompts, (step + 1) * batch):>5} prompts, mean reward "
                          f"{np.concatenate(rewards).mean():.3f}", highlight=False)
    grades = np.concatenate(rewards)
    by_prompt = grades.mean(axis=1)
    return {
        "prompts": prompts, "samples": samples, "temperature": config.sampling.temperature,
        "mean_reward": float(grades.mean()),
        "standard_error": float(by_prompt.std(ddof=1) / math.sqrt(prompts)) if prompts > 1 else 0.0,
        "mean_of_the_best_sample": float(grades.max(axis=1).mean()),
        "mean_tokens": float(np.concatenate(lengths).mean()),
        "share_finished": float(np.concatenate(finished).mean()),
        "graded_0_by_failure": int(failures),
        "seconds_of_rollouts_compiling_included": round(seconds, 3),
    }


def export(arguments) -> int:
    """`jspec export`: a model, or a run's last checkpoint, as a directory that transformers loads."""
    with telling(f"loading {arguments.source}"):
        source = open_source(arguments.source, [])
    with telling(f"writing {arguments.directory}"):
        written = jspec.export(source.policy, arguments.directory, source.tokenizer)
    print(written)
    return 0


def export_draft(arguments) -> int:
    """`jspec draft export`: a draft in the layout that others publish."""
    with telling(f"loading {arguments.model} and {arguments.draft}"):
        source = open_source(arguments.model, [])
        draft = jspec.load_draft(source.policy, arguments.draft)
    print(publish(draft, arguments.directory, arguments.layout, hub_id(arguments.model)))
    return 0

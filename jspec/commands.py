"""What `jspec rollout`, `jspec export` and `jspec draft export` do; `jspec eval` is in
`evaluation.py`."""

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

import jspec
from jspec.answering import batch_on_mesh
from jspec.arguments import path
from jspec.distributed import fetch
from jspec.drafts import Draft
from jspec.drafts.base import check_finite
from jspec.errors import InputError
from jspec.heads import not_run_by_vllm, publish
from jspec.hub.adapter import export_adapter
from jspec.hub.architectures import config_to_hf
from jspec.hub.exporter import new_directory
from jspec.hub.names import hub_id
from jspec.model import Policy
from jspec.model.lora import trained
from jspec.output import screen
from jspec.prepare import make_sampling, make_speculation
from jspec.progress import telling
from jspec.rl.answers import answer_text
from jspec.rl.encode import encode_prompt
from jspec.run_dir import adapted_policy
from jspec.session import Session, mesh_for, session
from jspec.sources import Source, choose_draft, mesh_of, open_source
from jspec.speculate.arguments import check


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
    how = "one token at a time" if draft is None else f"with {draft.name} drafts"
    for doing in ("compiling, then decoding", "timing: decoding"):
        with telling(f"{doing} {how}"):
            start = time.perf_counter()
            out = jax.block_until_ready(jspec.rollout(policy, draft, batch, sampling=sampling,
                                                      speculation=speculation))
            seconds = time.perf_counter() - start
    return Timed(fetch(out), seconds)


def rollout(arguments: argparse.Namespace) -> int:
    """`jspec rollout`: the same prompt and seed without and with a draft, side by side."""
    with session() as opened:
        return side_by_side(arguments, opened)


def side_by_side(arguments: argparse.Namespace, opened: Session) -> int:
    """`rollout`, once the session is open."""
    overrides = [(f"sampling.{key}", getattr(arguments, key))
                 for key in ("temperature", "top_k", "top_p", "min_p", "max_new_tokens")]
    overrides += [(f"speculation.{name}", getattr(arguments, name))
                  for name in ("k", "rule", "kernels")]
    wanted = None if arguments.draft is None else (arguments.draft,)
    source = open_source(arguments.model, overrides, arguments.dtype, wanted)
    opened.use(mesh_for(source.shape.config, arguments.samples, "--samples"))
    make_draft = choose_draft(source, arguments.draft, arguments.draft_path)
    tokens = encode_prompt(source.tokenizer, arguments.prompt, arguments.system, not arguments.raw)
    batch = batch_on_mesh([tokens], "rollout", group_size=arguments.samples, seed=arguments.seed)
    sampling, speculation = make_sampling(source.config), make_speculation(source.config)
    check(source.shape, None, batch, sampling, speculation, jspec.Batching())
    with telling(f"loading {arguments.model}"):
        policy = source.load_finite()
        draft = make_draft and make_draft(policy)
        policy = jspec.reshard(policy)
    plain = time_rollout(policy, None, batch, sampling, speculation)
    fast = None if draft is None else time_rollout(policy, draft, batch, sampling, speculation)

    def text(timed: Timed) -> Text:
        # a model may write what looks like markup
        return Text(answer_text(source.tokenizer, timed.rollout, 0))

    console = screen()
    console.print(Panel(text(plain), title="autoregressive", title_align="left"))
    if fast is not None:
        exact = arguments.rule == "coupled" or arguments.temperature == 0
        same = (f" ({compare(plain.rollout, fast.rollout)})" if exact
                else " (another sample of the same distribution)")
        console.print(Panel(text(fast), title=draft.name + same, title_align="left"))
    console.print(speed_table(plain, fast, draft, arguments.k))
    return 0


SAME = "the same tokens"


def compare(plain, fast) -> str:
    """Whether two rollouts are the same tokens, and if not, where they part."""
    for row in range(len(plain.lengths)):
        one, other = (out.tokens[row][out.mask[row]] for out in (plain, fast))
        length = min(len(one), len(other))
        apart = np.flatnonzero(one[:length] != other[:length])
        if len(apart) or len(one) != len(other):
            return (f"parts from it at token {int(apart[0]) if len(apart) else length} of answer "
                    f"{row}")
    return SAME


def speed_table(plain: Timed, fast: Timed | None, draft: Draft | None, k: int) -> Table:
    """Speed and acceptance side by side."""
    def accepted(timed: Timed) -> str:
        stats = timed.rollout.stats
        return ("  ".join(f"{a / d:.0%}" if d else "-"
                          for a, d in zip(stats.accepted, stats.drafted, strict=True)) or "-")

    table = Table(show_edge=False)
    table.add_column("")
    columns = [("autoregressive", plain)] + ([(f"{draft.name}, k = {k}", fast)] if fast else [])
    for title, _ in columns:
        table.add_column(title, justify="right")
    # of other texts, shorter or longer ones, only seconds a token can be compared
    alike = fast is None or compare(plain.rollout, fast.rollout) == SAME
    rows = {
        "tokens": lambda t: str(t.tokens),
        "seconds, compiling excluded": lambda t: f"{t.seconds:.3g}",
        "tokens/s": lambda t: f"{t.speed:.1f}",
        "speed-up" if alike
        else "speed-up a token (other texts)": lambda t: f"{t.speed / plain.speed:.2f}x",
        "passes over the weights": lambda t: str(int(t.rollout.stats.cycles.max())),
        "tokens a cycle": lambda t:
        f"{float(t.rollout.lengths.sum() / max(t.rollout.stats.cycles.sum(), 1)):.2f}",
        "accepted, by draft position": accepted,
    }
    for name, show in rows.items():
        table.add_row(name, *(show(timed) for _, timed in columns))
    return table


def export(arguments: argparse.Namespace) -> int:
    """`jspec export`: a model, or a run's last checkpoint, as a directory that transformers
    loads, or the run's adapters as one that PEFT does."""
    with session() as opened:
        new_directory(arguments.directory)
        source = open_source(arguments.source, [], drafters=())
        config_to_hf(source.shape.config)
        opened.use(mesh_of(source)[0])
        if arguments.adapter:
            written = adapter_of(source, arguments.directory)
            screen().print(written, soft_wrap=True)
            return 0
        with telling(f"loading {arguments.source}"):
            policy = source.load_finite()
        with telling(f"writing {arguments.directory}"):
            written = jspec.export(policy, arguments.directory, source.tokenizer)
        screen().print(written, soft_wrap=True)
    return 0


def adapter_of(source: Source, directory: str) -> Path:
    """Writes a run's adapters. Raises InputError for what is no run, or has none, or none that are
    finite."""
    if source.own is None:
        raise InputError(f"{source.name} is no run, and adapters are those of one; leave --adapter "
                         "out")
    policy = adapted_policy(Path(source.name).expanduser())
    check_finite(source.name, trained(policy), "take a checkpoint from before")
    return export_adapter(policy, directory, source.own.model.name)


def export_draft(arguments: argparse.Namespace) -> int:
    """`jspec draft export`: a draft in the layout that others publish."""
    with session() as opened:
        # no model's, which a head may join
        if not (path("directory", arguments.directory) / "config.json").exists():
            new_directory(arguments.directory)
        source = open_source(arguments.model, [], drafters=())
        opened.use(mesh_of(source)[0])
        with telling(f"loading {arguments.draft}"):
            draft = jspec.load_draft(source.shape, arguments.draft)
        written = publish(draft, arguments.directory, arguments.layout, hub_id(arguments.model),
                          source.load, source.tokenizer)
        missing = not_run_by_vllm(draft, arguments.layout)
        say_of = f" (vLLM does not run: {'; '.join(missing)})" if missing else ""
        screen().print(f"{written}{say_of}", soft_wrap=True)
    return 0

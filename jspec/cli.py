"""The command line. Handlers import what they need when they run, so that `--help` and mistakes
answer at once."""

import argparse
import importlib
import logging
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jspec import user_code
from jspec.choices import DRAFTERS, DTYPES, KERNELS, MAX_NEW_TOKENS, MOST_SAMPLES, RULES, SEED_HIGH
from jspec.errors import InputError
from jspec.exits import guarded
from jspec.parsing import Parser, add_config, drafter, number, steps
from jspec.scale.options import add_fit, add_project
from jspec.stopping import terminate_by_exception

EPILOG = """\
a first look:
  jspec rollout smollm2-135m-instruct --prompt "Count from one to twenty."
  jspec train configs/quickstart.yaml
  jspec train --help                     every key of a config; --help grpo: what a section's mean
"""

NAMED = "short name (smollm2-135m-instruct), hub id, directory of safetensors or .gguf file"
MODEL = NAMED + ", or a run's output_dir (its last checkpoint; RUN@best, RUN@STEP: another)"
Handler = Callable[[argparse.Namespace], int]


def parser() -> Parser:
    """The whole command line; each command's handler is its `run` default."""
    top = Parser(prog="jspec", description="GRPO with lossless speculative rollouts, in one JAX "
                 "program on one mesh.", epilog=EPILOG)
    commands = top.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)

    def command(name: str, run: Handler | None, summary: str, **options: Any) -> Parser:
        made = commands.add_parser(name, help=summary,
                                   description=summary[0].upper() + summary[1:] + ".", **options)
        made.set_defaults(run=run)
        return made

    _add_train(command("train", _train, "train a policy with GRPO; the same command again resumes",
                       keys="config:Config"))
    _add_rollout(command("rollout", _computing("commands:rollout"),
                         "speculative and autoregressive decoding of one prompt, side by side"))
    _add_eval(command("eval", _computing("evaluation:evaluate"),
                      "mean reward, pass@k and maj@k of a policy over a task"))
    fetch = command("fetch", _fetch, "download a model into the cache; a second time does nothing")
    fetch.add_argument("model", metavar="NAME", help="short name (smollm2-135m-instruct) or hub id")
    export = command("export", _computing("commands:export"),
                     "write a directory that transformers loads")
    export.add_argument("source", metavar="SOURCE", help=MODEL)
    export.add_argument("directory", metavar="DIR", help="where to; must not exist or be empty")
    export.add_argument("--adapter", action="store_true", help="of a run with lora.rank: its "
                        "adapters alone, as PEFT reads them; without this they are added to the "
                        "weights")
    _add_inspect(command("inspect", _computing("viewing.samples:inspect"),
                         "page through the samples of a run"))
    report = command("report", _computing("viewing.report:report"),
                     "write all of a run as one page of HTML, which needs no network")
    report.add_argument("source", metavar="RUN", help="the output_dir of a run, over or not")
    report.add_argument("--html", metavar="FILE", help="where to (default: RUN/report.html)")
    command("bench", _bench, "time rollouts (arguments: benchmarks/rollout.py); `bench drafts "
            "MODEL` compares drafters, `bench tail MODEL` times answers of natural lengths, `bench "
            "cost MODEL` what a cycle costs", add_help=False)
    draft = command("draft", None, "train a draft by itself, or write it as others read it")
    drafts = draft.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    _add_draft_train(drafts)
    _add_draft_export(drafts)
    profile = command("profile", _profile, "trace one step, and say where its time and memory go",
                      keys="config:Config")
    add_config(profile)
    profile.add_argument("--out", metavar="DIR",
                         help="where the trace goes (default: output_dir/profile)")
    add_fit(command("fit", _fit, "say whether a config's step fits chips that are not here, and "
                    "the least it can take there", keys="config:Config"))
    add_project(command("project", _project, "what speculation is to bring to rollouts and steps "
                        "on machines that are not here (docs/scale.md)"))
    return top


def _add_train(made: Parser) -> None:
    add_config(made)
    made.add_argument("--print-config", action="store_true",
                      help="print the whole configuration as YAML and stop")


def _add_draft_train(drafts: Any) -> None:
    made = drafts.add_parser("train", keys="draft_config:DraftTrainingConfig",
                             help="train one on the policy's own answers",
                             description="Train a draft on the policy's own answers; the same "
                             "command again goes on from where it was.")
    made.set_defaults(run=_train_draft)
    made.add_argument("model", metavar="MODEL", help=NAMED)
    made.add_argument("overrides", metavar="key=value", nargs="*",
                      help="such as draft.loss=overlap samples.count=512")
    made.add_argument("--config", metavar="FILE",
                      help="a YAML file of these keys, such as configs/draft-smollm2.yaml")


def _add_draft_export(drafts: Any) -> None:
    made = drafts.add_parser("export", help="write one in the layout that others publish",
                             description="Write a draft in the layout that others publish: one of "
                             "eagle3, peagle, dflash or dspark as SpecForge does (vLLM serves it, "
                             "SGLang all but peagle), the model of a draft_model as `jspec "
                             "export` does, an mtp head with the conventions of a published "
                             "architecture as that one's own. What vLLM does not run of it "
                             "stands beside its place.")
    made.set_defaults(run=_computing("commands:export_draft"))
    made.add_argument("model", metavar="MODEL", help=MODEL)
    made.add_argument("draft", metavar="DRAFT", help="the output_dir of `jspec draft train` or of "
                      "a run, a directory with a published draft, or the short name of a model "
                      "whose draft ships with jspec")
    made.add_argument("directory", metavar="DIR", help="where to; must not exist or be empty (an "
                      "mtp head also joins its policy in a directory of `jspec export`)")
    made.add_argument("--layout", choices=("specforge", "speculators"), help="of eagle3, peagle, "
                      "dflash and dspark: SpecForge's (the default), or that of the speculators "
                      "library")


def _add_rollout(made: Parser) -> None:
    made.add_argument("model", metavar="MODEL", help=MODEL)
    made.add_argument("--prompt", required=True, help="what to answer")
    made.add_argument("--system", metavar="TEXT", help="system message of the chat")
    made.add_argument("--raw", action="store_true",
                      help="continue the prompt as plain text, without chat template")
    made.add_argument("--draft", type=drafter, metavar="NAME",
                      help=f"the drafter: {', '.join(DRAFTERS)}, none, or your own, "
                      f"{user_code.EXAMPLE} (default: the trained one of a run's output_dir, or "
                      "the one that ships for the model; ngram otherwise)")
    made.add_argument("--draft-path", metavar="SOURCE", help="a trained draft, as jspec.load_draft "
                      "takes it, or with --draft draft_model a model to draft with, by name")
    made.add_argument("--k", type=int, default=3, help="tokens drafted per cycle (default: 3)")
    made.add_argument("--rule", choices=RULES, default="coupled",
                      help="coupled: the autoregressive tokens themselves, so that both texts are "
                      "one; rejection, block: exact in distribution, drafts judged one by one or "
                      "together, as training does (default: coupled)")
    made.add_argument("--kernels", choices=KERNELS, default="auto",
                      help="auto: the chip's own where it has them; reference: plain JAX; pallas: "
                      "the kernels or an error (default: auto)")
    made.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default: 1)")
    made.add_argument("--top-k", type=int, default=0, help="0: off (default)")
    made.add_argument("--top-p", type=float, default=1.0, help="1: off (default)")
    made.add_argument("--min-p", type=float, default=0.0, help="0: off (default)")
    made.add_argument("--max-new-tokens", type=int, default=MAX_NEW_TOKENS,
                      help="longest answer (default: %(default)s)")
    made.add_argument("--samples", type=number(int, 1, MOST_SAMPLES), default=1, metavar="N",
                      help="answers decoded together; one is shown (default: 1). They are split "
                      "over the devices, and over those that are left the model's heads")
    made.add_argument("--seed", type=number(int, 0, SEED_HIGH), default=0,
                      help="of the sampling noise (default: 0)")
    made.add_argument("--dtype", choices=DTYPES, help="default: bfloat16, float32 on the CPU")


def _add_inspect(made: Parser) -> None:
    made.add_argument("source", metavar="RUN", help="the output_dir of a run, over or not")
    made.add_argument("--step", type=steps, metavar="STEPS",
                      help="of one step, or of some, such as 10-20 (default: all)")
    made.add_argument("--source", dest="source_name", metavar="NAME",
                      help="answers to prompts of this one of data.source's several alone")
    made.add_argument("--reward-below", type=float, metavar="X", help="with a smaller reward alone")
    made.add_argument("--reward-above", type=float, metavar="X", help="with a larger reward alone")
    made.add_argument("--failed", action="store_true", help="those alone that a reward function "
                      "could not grade")
    made.add_argument("--sort", choices=("step", "reward", "length", "accepted"), default="step",
                      help="the order; step: the newest first (default), others: ascending")
    made.add_argument("--reverse", action="store_true", help="the other way round")
    made.add_argument("--count", type=number(int, 1), default=100, metavar="N",
                      help="how many at most (default: %(default)s)")


def _add_eval(made: Parser) -> None:
    made.add_argument("source", metavar="MODEL_OR_CONFIG",
                      help=MODEL + ", or a config's .yaml file")
    made.add_argument("overrides", metavar="key=value", nargs="*",
                      help="of a config, such as data.source=my.jsonl")
    made.add_argument("--prompts", type=int, help="how many prompts of each source, as "
                      "evaluation.prompts=N (default: 64, or all if there are fewer)")
    made.add_argument("--samples", type=int, help="answers to each, as evaluation.samples=N "
                      "(default: 4)")
    made.add_argument("--temperature", type=float,
                      help="instead of sampling.temperature; 0 is greedy")
    made.add_argument("--batch", type=int, help="prompts decoded together, as evaluation.batch=N "
                      "(default: 8)")
    made.add_argument("--json", metavar="FILE", help="write the result as JSON, '-' for stdout")
    made.add_argument("--run-code", action="store_true", help="run the Python file that a run's "
                      "own config names as its reward or its drafter")


def _computing(target: str) -> Handler:
    """What runs `module:function` of jspec with the parsed arguments, once JAX is there."""
    def run(arguments: argparse.Namespace) -> int:
        _import_jax()
        module, name = target.split(":")
        return getattr(importlib.import_module(f"jspec.{module}"), name)(arguments)

    return run


def _import_jax() -> None:
    """Raises InputError for a JAX_... variable that JAX does not understand."""
    try:
        import jax  # noqa: F401
    except ValueError as error:
        said = re.sub(r"jax_\w+", lambda name: name[0].upper(), str(error))
        raise InputError(f"JAX cannot read its settings from the environment: {said}; mend or "
                         "unset that variable") from error


def _train(arguments: argparse.Namespace) -> int:
    from jspec.config import load_config
    from jspec.settings import to_yaml

    config = load_config(arguments.config, arguments.overrides)
    if arguments.print_config:
        print(to_yaml(config), end="")
        return 0
    _import_jax()
    from jspec.train import train

    return train(config)


def _train_draft(arguments: argparse.Namespace) -> int:
    from jspec.config import load_config
    from jspec.draft_config import DraftTrainingConfig

    overrides = [("model.name", arguments.model), *arguments.overrides]
    config = load_config(arguments.config, overrides, DraftTrainingConfig)
    _import_jax()
    from jspec.draft_training import train_draft

    return train_draft(config)


def _profile(arguments: argparse.Namespace) -> int:
    from jspec.config import load_config

    config = load_config(arguments.config, arguments.overrides)
    _import_jax()
    from jspec.profile_step import profile

    return profile(config, Path(arguments.out or Path(config.output_dir) / "profile"))


def _fit(arguments: argparse.Namespace) -> int:
    from jspec.scale.topologies import set_environment, topology

    topology(arguments.on)  # before anything slow
    set_environment()
    _import_jax()
    from jspec.scale.commands import answer

    return answer(arguments)


def _project(arguments: argparse.Namespace) -> int:
    from jspec.config import load_config

    config = load_config(arguments.config, arguments.overrides)
    _import_jax()
    from jspec.scale.project_command import run

    return run(config, arguments)


def _fetch(arguments: argparse.Namespace) -> int:
    from jspec import hub

    print(hub.fetch(arguments.model))
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    _import_jax()
    named = arguments.rest[:1] in (["drafts"], ["tail"], ["cost"])
    name, rest = (arguments.rest[0], arguments.rest[1:]) if named else ("rollout", arguments.rest)
    checkout = Path(__file__).resolve().parent.parent
    script = checkout / "benchmarks" / f"{name}.py"
    if not script.is_file():
        raise InputError(f"there is no {script}: `jspec bench` needs a source checkout of jspec, "
                         "not a wheel")
    # for usage lines and the results' command
    sys.argv = [f"jspec bench {name}" if named else "jspec bench", *rest]
    from jspec.session import session

    with session():
        importlib.import_module(f"benchmarks.{name}").main(rest)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    top = parser()
    chosen, rest = top.parse_known_args(arguments)
    if chosen.run is _bench:
        chosen.rest = rest
    elif hasattr(chosen, "overrides") and not any(text.startswith("-") for text in rest):
        chosen.overrides += rest  # argparse gives up on positional arguments that follow an option
    elif rest:
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0, 2 for a mistake of the user's (one line on
    stderr), 128 + n after signal n, 1 where memory or room on a disk ran out; `train` has one more
    (see `jspec.train`)."""
    # Orbax logs stack traces of what it then raises
    logging.getLogger("absl").setLevel(logging.CRITICAL)

    def run() -> int:
        chosen = _parse(arguments)
        return chosen.run(chosen)

    with terminate_by_exception():
        return guarded(run)


if __name__ == "__main__":
    sys.exit(main())

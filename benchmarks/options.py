"""What the benchmarks' command lines have in common: lists, drafters with options, and where
results go."""

import argparse
import difflib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jspec import cli, user_code, yaml_text
from jspec.choices import DRAFTERS
from jspec.errors import InputError
from jspec.output import open_output

PLAIN = "none"
KERNELS_HELP = ("auto: the chip's own where it has them; reference: plain JAX; pallas: the kernels "
                "or an error (default: auto)")


def one_of(what: str, known: Sequence[str]) -> Callable[[str], str]:
    """A parser of names that names the nearest known one."""
    def parse(text: str) -> str:
        if text in known:
            return text
        near = difflib.get_close_matches(text, known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        raise argparse.ArgumentTypeError(f"unknown {what} {text!r}; {hint}")
    return parse


def named_drafter(*others: str) -> Callable[[str], str]:
    """A parser of drafters without options: jspec's own, a user's `path/to/file.py:NAME`, and
    `others`."""
    def parse(text: str) -> str:
        return text if user_code.split(text) else one_of("drafter", (*others, *DRAFTERS))(text)
    return parse


def _parts(draft: str) -> list[str]:
    """[name, option, ...] of a drafter with options, whose name may be `path/to/file.py:NAME`."""
    name, *rest = draft.split(":")
    return [f"{name}:{rest[0]}", *rest[1:]] if name.endswith(".py") and rest else [name, *rest]


def drafter(*others: str) -> Callable[[str], str]:
    """A parser of drafters with or without options, as in self:bits=4, and of `others`, which have
    none."""
    def parse(text: str) -> str:
        name, *options = _parts(text)
        named_drafter(*others)(name)
        try:
            split_options(text)
            wrong = bool(options) and name in others
        except InputError:
            wrong = True
        if wrong:
            raise argparse.ArgumentTypeError("must be a drafter, or one with options as in "
                                             f"self:bits=4, not {text!r}")
        return text
    return parse


def split_options(draft: str) -> tuple[str, dict[str, Any]]:
    """`self:bits=4` as ("self", {"bits": 4}). Raises InputError if an option is no key=value of
    YAML."""
    name, *options = _parts(draft)
    made = {}
    for option in options:
        key, equals, text = option.partition("=")
        if not (key and equals):
            raise InputError(f"--drafts {draft}: {option!r} is not key=value")
        made[key] = yaml_text.value(text, f"--drafts {draft}")
    return name, made


class Listed(argparse.Action):
    """Items separated by commas, spaces or both, each once. `const` parses one."""

    def __call__(self, parser, namespace, values, option_string=None):
        items = [item for text in values for item in text.split(",") if item]
        try:
            parsed = list(dict.fromkeys(self.const(item) for item in items))
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentError(self, str(error)) from None
        if not parsed:
            raise argparse.ArgumentError(self, "needs at least one")
        setattr(namespace, self.dest, parsed)


def add_listed(parser: argparse.ArgumentParser, option: str, item: Callable[[str], Any],
               default: list, help: str) -> None:
    """An option that takes a list, its default told."""
    shown = " ".join(map(str, default))
    parser.add_argument(option, nargs="+", action=Listed, const=item, default=default,
                        metavar=option.strip("-").rstrip("s").upper(),
                        help=f"{help} (default: {shown})")


def open_results(args: argparse.Namespace) -> None:
    """Open the files of --json and --plot. Raises InputError now for what would fail when they are
    written, after hours."""
    plot = getattr(args, "plot", None)
    if plot and importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib: pip install matplotlib")
    if plot and Path(plot).suffix not in (".png", ".pdf", ".svg"):
        raise InputError(f"--plot {plot} must end in .png, .pdf or .svg")
    args.json = open_output(args.json, "--json")
    if plot:
        args.plot = open_output(plot, "--plot")


def program(main: Callable[[], Any]) -> None:
    """End the process with what `main` returns, or 0 if that is no exit code; mistakes of the
    user's are one line."""
    def run() -> int:
        result = main()
        return result if isinstance(result, int) else 0

    sys.exit(cli.guarded(run))

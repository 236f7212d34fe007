"""What command lines are parsed with: one-line errors, numbers in bounds, lists, and a config with
its keys. Free of JAX, for it is read before anything starts."""

import argparse
import importlib
import math
import textwrap
from collections.abc import Callable
from typing import Any, NoReturn

from jspec import user_code
from jspec.choices import DRAFTERS
from jspec.errors import InputError


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; `keys` appends the keys of that class, "config:Config", to
    the help."""

    def __init__(self, *arguments, keys: str | None = None, **options) -> None:
        super().__init__(*arguments, formatter_class=argparse.RawDescriptionHelpFormatter,
                         **options)
        self.keys = keys

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see `{self.prog} --help`)")

    def format_help(self) -> str:
        return super().format_help() + (f"\n{keys_help(self.keys)}" if self.keys else "")


def number(kind: type, low: float, high: float = 2**31 - 1) -> Callable[[str], Any]:
    """A parser of finite numbers from `low` to `high`, for an argument's `type`."""
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {what} of at least {low} and at most "
                                             f"{high}, not {text!r}" if value > high
                                             else f"must be {what} of at least {low}, not {text!r}")
        return value
    return parse


def listed(item: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A parser of what is separated by commas, each once."""
    def parse(text: str) -> list[Any]:
        return list(dict.fromkeys(item(part.strip()) for part in text.split(",")))
    return parse


def drafter(text: str) -> str:
    """A parser of drafters' names and `none`."""
    if text not in (*DRAFTERS, "none") and user_code.split(text) is None:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(DRAFTERS)}, none, "
                                         f"{user_code.EXAMPLE}, not {text!r}")
    return text


def keys_help(kind: str) -> str:
    """Every configuration key with its type, default and meaning, as text."""
    from jspec import settings

    module, _, name = kind.partition(":")
    kind = getattr(importlib.import_module(f"jspec.{module}"), name)
    lines = ["keys of a config, each also settable as key=value after it:"]
    for key, type_name, default, meaning in settings.describe(kind):
        if not type_name:
            lines.append(f"\n  {key}: {meaning}")
            continue
        lines.append(f"    {key + ' = ' + default:<44} {type_name}")
        lines += textwrap.wrap(meaning, 110, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines) + "\n"


def add_config(made: Parser) -> None:
    """A config and what is changed of it, as `config` and `overrides`."""
    made.add_argument("config", metavar="CONFIG",
                      help="a YAML file, such as configs/quickstart.yaml")
    made.add_argument("overrides", metavar="key=value", nargs="*", default=[],
                      help="such as grpo.learning_rate=2e-6 steps=20; values are YAML, so text "
                      "with [ { : # needs quotes, data.source='\"a: b.jsonl\"'")

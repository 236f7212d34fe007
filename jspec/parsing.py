"""What command lines are parsed with: one-line errors, numbers in bounds, lists, and a config with
its keys. Free of JAX, for it is read before anything starts."""

import argparse
import math
from collections.abc import Callable
from typing import Any, NoReturn

from jspec import user_code
from jspec.choices import DRAFTERS
from jspec.errors import InputError


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; with `keys`, a class such as "config:Config", the help tells
    of its keys, a page of all or one section."""

    def __init__(self, *arguments, keys: str | None = None, **options) -> None:
        super().__init__(*arguments, formatter_class=argparse.RawDescriptionHelpFormatter,
                         **{"add_help": not keys, **options})
        self.keys = keys
        if keys:
            self.add_argument("-h", "--help", action=_KeysHelp, nargs="?", metavar="SECTION",
                              help="show this message and exit; of a SECTION, a key or 'all': "
                              "every key with type, default and meaning")

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see `{self.prog} --help`)")


class _KeysHelp(argparse.Action):
    """`--help [SECTION]`."""

    def __call__(self, parser, namespace, values, option_string=None) -> NoReturn:
        from jspec.keys_help import keys_help

        said = keys_help(parser.keys, parser.prog, values)
        print(f"{parser.format_help()}\n{said}" if values is None else said, end="")
        parser.exit()


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


def steps(text: str) -> tuple[int, int]:
    """A parser of a step, 7, or of some, 7-12: the first and the last one."""
    first, _, last = text.partition("-")
    if not (first.isdecimal() and (last or first).isdecimal() and int(first) <= int(last or first)):
        raise argparse.ArgumentTypeError(f"must be a step, such as 7, or some, such as 7-12, not "
                                         f"{text!r}")
    return int(first), int(last or first)


def drafter(text: str) -> str:
    """A parser of drafters' names and `none`."""
    if text not in (*DRAFTERS, "none") and user_code.split(text) is None:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(DRAFTERS)}, none, "
                                         f"{user_code.EXAMPLE}, not {text!r}")
    return text


def add_config(made: Parser) -> None:
    """A config and what is changed of it, as `config` and `overrides`."""
    made.add_argument("config", metavar="CONFIG",
                      help="a YAML file, such as configs/quickstart.yaml")
    made.add_argument("overrides", metavar="key=value", nargs="*", default=[],
                      help="such as grpo.learning_rate=2e-6 steps=20; values are YAML, so text "
                      "with [ { : # needs quotes, data.source='\"a: b.jsonl\"'")

"""`jspec fit`'s options."""

import argparse

import pytest

from jspec.config import Config
from jspec.errors import InputError
from jspec.parsing import Parser
from jspec.scale.commands import check
from jspec.scale.options import add_fit
from jspec.sections import DraftSection as Draft
from jspec.sections import SpeculationSection as Speculation


def asked(*more: str) -> argparse.Namespace:
    made = Parser()
    add_fit(made)
    return made.parse_args(["run.yaml", "--on", "v5p-8", *more])


@pytest.mark.parametrize("config, options, says", [
    (Config(), ["--length", "129"], "more than sampling.max_new_tokens = 128"),
    (Config(), ["--accepted", "8.5"], "yields 8 at most"),
    (Config(speculation=Speculation(k=((4, 3), (9, 1)))), ["--accepted", "5"], "yields 4 at most"),
    (Config(draft=Draft(name="none")), ["--accepted", "1.5"], "yields 1 at most"),
    (Config(), ["--layers", "4", "4"], "two depths; name the smaller one")])
def test_what_cannot_be_is_said_before_anything_is_compiled(config, options, says):
    check(config, asked())
    with pytest.raises(InputError, match=says):
        check(config, asked(*options))


def test_a_picture_is_an_svg():
    assert asked("--plot", "a.svg").plot == "a.svg"
    with pytest.raises(InputError, match=r"--plot: must end in .svg, not 'a.png'"):
        asked("--plot", "a.png")

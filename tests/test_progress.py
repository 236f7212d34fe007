import io
import sys
import time

import jax
import pytest
from rich.console import Console

from jspec import progress
from jspec.progress import telling


@pytest.fixture
def lines(monkeypatch):
    """The lines of a log that is written without delay."""
    said = []
    monkeypatch.setattr(progress, "say", said.append)
    monkeypatch.setattr(progress, "AFTER_S", 0.0)
    monkeypatch.setattr(progress, "EVERY_S", 0.001)
    return said


def wait_for(lines, text):
    deadline = time.monotonic() + 60
    while not any(text in line for line in lines):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_log_says_what_begins_how_far_it_is_and_how_long_it_took(lines):
    with telling("decoding", total=64) as advance:
        advance(8)
        wait_for(lines, "decoding: 8 of 64")
        advance()
        wait_for(lines, "decoding: 9 of 64")
    assert lines[0] == "decoding ..."
    assert lines[-1].startswith("decoding: ended after ")


def test_without_a_count_a_log_says_that_it_goes_on(lines):
    with pytest.raises(ZeroDivisionError), telling("compiling the update"):
        wait_for(lines, "compiling the update: ")
        raise ZeroDivisionError
    assert lines[-1].startswith("compiling the update: ended after ")


def test_what_is_done_or_fails_at_once_needs_no_line(monkeypatch, capsys):
    monkeypatch.setattr(progress, "AFTER_S", 1000.0)
    with telling("loading"):
        pass
    assert capsys.readouterr() == ("", "")


def test_lines_are_no_markup(capsys):
    progress.say("loading [/x]")
    assert capsys.readouterr().err == "jspec: loading [/x]\n"


def test_only_the_first_process_tells(monkeypatch, capsys):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with telling("loading", total=2) as advance:
        advance()
    assert capsys.readouterr().err == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_bars_lie_inside_one_another_and_stdout_stays_apart(monkeypatch, capsys):
    """As a download inside of loading. What goes to a file or a pipe must not land on the
    terminal."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    console = Console(stderr=True)
    monkeypatch.setattr(progress, "stderr", lambda: console)
    with telling("loading [/x]"), telling("downloading", total=2) as advance:
        advance()
        print("a result")
    assert capsys.readouterr().out == "a result\n"
    assert "loading [/x]" in terminal.getvalue() and "0/2" in terminal.getvalue()
    assert "a result" not in terminal.getvalue()

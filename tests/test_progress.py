import io
import sys

import jax
import pytest
from rich.console import Console

from jspec import progress
from jspec.progress import telling


@pytest.fixture
def clock(monkeypatch):
    """Seconds that only the test moves on."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_says_what_begins_counts_now_and_then_and_how_long_it_took(clock, capsys):
    with telling("decoding [/x]", total=64) as advance:
        advance(8)  # at once: no line
        clock[0] = 20.0
        advance(8)
        advance(8)
        clock[0] = 61.4
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["jspec: decoding [/x] ...", "jspec: decoding [/x]: 16 of 64, 20 s",
                                "jspec: decoding [/x]: done in 61 s"]


def test_what_is_done_at_once_is_one_line(clock, capsys):
    with telling("loading"):
        pass
    assert capsys.readouterr().err == "jspec: loading ...\n"


def test_what_fails_is_not_done(clock, capsys):
    with pytest.raises(ZeroDivisionError), telling("loading"):
        clock[0] = 60.0
        raise ZeroDivisionError
    assert capsys.readouterr().err == "jspec: loading ...\n"


def test_only_the_first_process_tells(monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with telling("loading", total=2) as advance:
        advance()
    assert capsys.readouterr().err == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_bars_lie_inside_one_another_and_stdout_stays_apart(monkeypatch, capsys):
    """As a download inside of loading. What goes to a file or a pipe must not land on the terminal."""
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

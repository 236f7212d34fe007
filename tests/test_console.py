"""What is printed is printed as it is, and nobody reading it is no accident."""

import io
import os
import signal

from rich.table import Table

from jspec.console import PlainConsole
from jspec.stopping import StopSignal


def test_names_are_no_markup():
    console = PlainConsole(file=io.StringIO(), width=60)
    name = "runs/[bold]x[/bold]/[red] :smile:"
    console.print(name, soft_wrap=True)
    table = Table(name)
    table.add_row(name)
    console.print(table)
    assert console.file.getvalue().count(name) == 3


def test_a_closed_output_asks_the_loop_to_stop_once(capsys):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    stop = StopSignal()
    before = os.dup(1)
    try:
        console = PlainConsole(stop.closed_output, file=Closed())
        console.print("one")
        console.print("two")
    finally:
        os.dup2(before, 1)
        os.close(before)
    assert stop.number == signal.SIGPIPE
    said = capsys.readouterr().err
    assert (said.count("\n")
            == 1 and "nobody reads the output any more: stopping after this step" in said)

"""Files that results go to, opened before there are any, and what is printed when nobody reads."""

import os
import stat
import subprocess
import sys

import pytest

from jspec.errors import InputError
from jspec.output import open_output, screen


def test_a_result_is_written_whole_into_a_folder_that_was_not_there(tmp_path):
    written = open_output(str(tmp_path / "new" / "x.json"), "--json")
    assert list((tmp_path / "new").iterdir()) == []  # tried, and nothing left
    written.write("1\n")
    written.write("2\n")
    path = tmp_path / "new" / "x.json"
    assert path.read_text() == "2\n" and list(path.parent.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444
    assert open_output(None, "--json") is None


def test_links_and_devices_stay_what_they_are(tmp_path):
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    open_output(str(tmp_path / "link.json"), "--json").write("new")
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "real.json").read_text() == "new"
    open_output("/dev/null", "--json").write("x")
    assert not os.path.isfile("/dev/null")


@pytest.mark.parametrize(("name", "message"), [
    (".", "is a directory; name a file in it"),
    ("file/x.json", "cannot be written: what should be its folder is a file"),
    ("a\0b", "cannot be written: "), ("x" * 300, "cannot be written: File name too long"),
])
def test_what_cannot_be_written_is_refused_at_once(tmp_path, name, message):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError) as caught:
        open_output(f"{tmp_path}/{name}", "--json")
    assert str(caught.value).startswith("--json ") and message in str(caught.value)


def test_a_pipe_is_written_as_it_is():
    """Of /dev/fd/N the link leads to no file."""
    reader, writer = os.pipe()
    open_output(f"/dev/fd/{writer}", "--json").write("result\n")
    assert os.read(reader, 100) == b"result\n"
    os.close(reader), os.close(writer)


def test_names_are_no_markup(capsys):
    screen().print("runs/[red]x :smile:")
    assert capsys.readouterr().out == "runs/[red]x :smile:\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no full device here")
def test_a_full_disk_under_stdout_is_one_line():
    program = "import jspec.cli, sys; sys.exit(jspec.cli.guarded(lambda: print('x') or 0))"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE,
                              text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "jspec: error: what is printed: No space left on device; make room" in done.stderr


def test_an_output_that_is_closed_is_no_trouble():
    program = ("import jspec.cli, sys; sys.exit(jspec.cli.guarded(lambda: "
               "print(sys.stdout.isatty(), sys.stderr) or 3))")
    done = subprocess.run(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", sys.executable, "-c", program])
    assert done.returncode == 3


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_what_the_terminal_has_no_character_for_is_escaped(encoding):
    program = ("import jspec.cli; from jspec.output import screen; "
               "jspec.cli.guarded(lambda: screen().print('r\\u00e9 \\udcff', soft_wrap=True) or 0)")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True,
                          env=os.environ | {"PYTHONIOENCODING": encoding})
    assert (done.stdout.decode(encoding)
            == {"ascii": "r\\xe9 \\udcff\n", "utf-8": "r\u00e9 \\udcff\n"}[encoding]), done


@pytest.mark.parametrize("program", [
    "from jspec.output import screen; c = screen(); [c.print('x' * 60) for _ in range(9000)]; "
    "open('done', 'w')",
    "import jspec.cli, sys; sys.exit(jspec.cli.guarded(lambda: print('x' * 600_000) or 0))",
    "import jspec.cli, sys; sys.exit(jspec.cli.guarded(lambda: print('x') or 0))",
])
def test_a_pipe_that_nobody_reads_is_no_trouble(tmp_path, program):
    """The reading end is closed before anything is written."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-c", program], stdout=writing, stderr=subprocess.PIPE,
                          cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.getcwd()})
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "done").exists() == ("done" in program)

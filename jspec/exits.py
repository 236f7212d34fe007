"""How a command ends: its exit code, and for what a user can put right one line on stderr."""

import errno
import os
import sys
from collections.abc import Callable

from jspec.errors import InputError, shortened


def guarded(run: Callable[[], int]) -> int:
    """The exit code of `run`; mistakes of the user's are one line on stderr and 2. That nobody
    reads what is printed any more (`jspec train --help | head`) is no mistake."""
    _settle_output()
    code = 0
    try:
        try:
            code = _explained(run)
        finally:
            sys.stdout.flush()  # trouble with it is noticed here, not at the interpreter's end
    except BrokenPipeError:
        from jspec.console import drop_stdout

        drop_stdout()
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            print(f"jspec: error: {shortened(str(error.filename))}: {error.strerror}",
                  file=sys.stderr)
            return 2
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        from jspec.console import drop_stdout

        drop_stdout()
        print(f"jspec: error: {error.filename or 'what is printed'}: {error.strerror}; make room, "
              "and give the same command again", file=sys.stderr)
        return code or 1
    return code


def _settle_output() -> None:
    """What is printed goes somewhere, if only into nothing, and whatever it holds can be
    printed."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the caller has closed it (`>&-`)
            setattr(sys, name, open(os.devnull, "w"))
        if hasattr(getattr(sys, name), "reconfigure"):  # names and messages are the user's
            getattr(sys, name).reconfigure(errors="backslashreplace")


def _explained(run: Callable[[], int]) -> int:
    try:
        return run()
    except InputError as error:
        print(f"jspec: error: {one_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("jspec: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        # XLA's word for it
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = (str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ") if str(error)
                else "no more is said")
        print(f"jspec: error: out of memory ({one_line(said[:200])}); take a smaller model, more "
              "devices, or fewer and shorter answers at a time (data.prompts_per_step, "
              "data.group_size, sampling.max_new_tokens, grpo.micro_batch; --batch)",
              file=sys.stderr)
        return 1


def one_line(text: str) -> str:
    """An error as one line, in which nothing that cannot be printed reaches the terminal as it
    is."""
    return "".join(c if c.isprintable() else " " if c.isspace() else repr(c)[1:-1] for c in text)

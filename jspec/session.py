"""What every command that computes opens, once and in one place: the other processes, the platform,
the programs that were kept, signals, the log, and the mesh that all of its arrays are on."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.logging import RichHandler

from jspec import distributed
from jspec.compile_cache import keep_compiled
from jspec.console import PlainConsole
from jspec.errors import InputError
from jspec.model import ModelConfig
from jspec.progress import say, stderr
from jspec.sharding import mesh_of_rows
from jspec.stopping import terminate_by_exception


@dataclasses.dataclass(frozen=True)
class Session:
    """An open session. console: what jspec's log is written to."""

    console: Console
    stack: ExitStack

    def use(self, mesh: Mesh) -> Mesh:
        """Have all that follows find `mesh` (`jax.set_mesh`), until the session ends."""
        self.stack.enter_context(jax.set_mesh(mesh))
        return mesh


def log_console() -> Console:
    """stderr, of the first process."""
    return stderr() if distributed.is_main() else PlainConsole(stderr=True, quiet=True)


def mesh_for(model: ModelConfig, rows: int, option: str) -> Mesh:
    """`sharding.mesh_of_rows`, with a word where it leaves devices out; option: what sets the
    number of rows.

    Raises InputError where several processes would be left without a device.
    """
    mesh, there = mesh_of_rows(model, rows), jax.device_count()
    if mesh.size < there:
        said = (f"{rows} row(s) and this model's {model.num_heads} heads can be split over "
                f"{mesh.size} of {there} devices; {option} {there} uses them all")
        if jax.process_count() > 1:
            raise InputError(said)
        say(said)
    return mesh


@contextmanager
def session(level: str = "warning",
            console: Callable[[], Console] = log_console) -> Iterator[Session]:
    """Joins the other processes and sets up what the commands share. Call it before any JAX
    computation.

    Args:
      level: how much is logged, see `Config.log_level`.
      console: makes what the log is written to; called when the processes know each other.

    Raises InputError where processes cannot meet, and for a platform that is not there.
    """
    with ExitStack() as stack:
        distributed.initialize()
        distributed.check_platform()
        keep_compiled()
        if threading.current_thread() is threading.main_thread():  # Python has signals there only
            # JAX's service for several processes has its own handler
            stack.enter_context(terminate_by_exception())
        opened = Session(console(), stack)
        set_up_logging(level, opened.console)
        yield opened


def set_up_logging(level: str, console: Console) -> None:
    """jspec's own log goes through the console, above the progress bar; libraries' only from
    warnings on."""
    ours = logging.getLogger("jspec")
    ours.setLevel(level.upper())
    ours.handlers = [RichHandler(console=console, show_path=False, show_time=False)]
    ours.propagate = False
    # Orbax logs stack traces of what it then raises
    logging.getLogger("absl").setLevel(logging.CRITICAL)

"""Python processes beside this one, for what must not be done in it."""

import os
import subprocess
import sys


def run_module(name: str, **environment: str) -> subprocess.Popen:
    """Starts `python -m NAME` with this process's import path, and pipes for its standard input and
    output.

    It is no part of this process's group: Ctrl-C is for us to handle. It should end when its input
    does.
    """
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return subprocess.Popen([sys.executable, "-P", "-m", name], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, process_group=0,
                            env={**os.environ, "PYTHONPATH": path, **environment})

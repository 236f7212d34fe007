"""Runs N processes of one jspec program on this machine:
`python -m jspec.local N ARGUMENTS OF jspec...`.

Process 0 has the terminal; what the others print goes to stderr behind their number. SIGINT and
SIGTERM are passed on to all. When one process fails, it is named, the others are stopped, and the
exit code is that of the one that failed.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from jspec.progress import say

# from the first failure to SIGKILL: the others may hang in a collective that will never finish
GRACE_S = 5.0


def run(count: int, command: Sequence[str]) -> int:
    """Runs `command` in `count` processes that know each other; returns the exit code (128 + n for
    signal n)."""
    address = f"127.0.0.1:{_free_port()}"
    processes = [_start(index, count, address, command) for index in range(count)]
    relays = [threading.Thread(target=_relay, args=(index, process.stdout), daemon=True)
              for index, process in enumerate(processes) if process.stdout]
    for relay in relays:
        relay.start()

    asked = []  # the signals that were passed on: what ends by them has not failed

    def forward(number, _frame) -> None:
        asked.append(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    previous = {number: signal.signal(number, forward)
                for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = _wait(processes, asked)
        # what the processes said last; a grandchild may hold the pipe open for longer
        for relay in relays:
            relay.join(timeout=5)
        return code
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _start(index: int, count: int, address: str, command: Sequence[str]) -> subprocess.Popen:
    environment = os.environ | {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_COORDINATOR_BIND_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
    }
    if _has_gpus(environment):
        environment["JAX_LOCAL_DEVICE_IDS"] = str(index)
    output = None if index == 0 else subprocess.PIPE
    # If this process is killed, so are the others. Not by preexec_fn: to fork is unsafe once JAX
    # has threads.
    prefix = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
    # A session of its own: Ctrl-C in the terminal must reach a process once, by way of `forward`.
    return subprocess.Popen([*prefix, *command], env=environment, stdout=output,
                            stdin=subprocess.DEVNULL,
                            stderr=subprocess.STDOUT if output else None, start_new_session=True)


def _has_gpus(environment) -> bool:
    platforms = environment.get("JAX_PLATFORMS", "")
    return (os.path.exists("/dev/nvidia0")
            and (not platforms or "cuda" in platforms or "gpu" in platforms))


def _relay(index: int, stream) -> None:
    with stream:
        for line in stream:
            sys.stderr.write(f"[{index}] {line.decode(errors='replace')}")
            sys.stderr.flush()


def _wait(processes: Sequence[subprocess.Popen], asked: Sequence[int]) -> int:
    failure, failed_at = 0, 0.0
    while None in (codes := [process.poll() for process in processes]):
        if not failure and any(codes):
            failure, failed_at = _first_failure(codes, asked), time.monotonic()
            for process in processes:
                process.terminate()
        if failure and time.monotonic() - failed_at > GRACE_S:
            for process in processes:
                process.kill()
        time.sleep(0.05)
    failure = failure or _first_failure(codes, asked)
    return 128 - failure if failure < 0 else failure


def _first_failure(codes: Sequence[int | None], asked: Sequence[int]) -> int:
    """The exit code of what failed, 0 for nothing. Says which it was, unless it said itself what is
    wrong (2)."""
    failed = [(index, code) for index, code in enumerate(codes) if code]
    # of several that ended together, one that was killed is the reason why the others failed
    index, code = min(failed, key=lambda pair: pair[1] > 0, default=(0, 0))
    if code not in (0, 2) and not asked:
        end = f"ended with exit code {code}" if code > 0 else f"was ended by {_signal_name(-code)}"
        memory = " (out of memory? the kernel's log says)" if code == -signal.SIGKILL else ""
        others = "; the others are stopped" if None in codes else ""
        say(f"process {index} of {len(codes)} {end}{memory}{others}")
    return code


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or not re.fullmatch("[1-9][0-9]{0,3}", arguments[0]):
        say("error: usage: python -m jspec.local N ARGUMENTS OF jspec..., N processes, at least 1")
        return 2
    return run(int(arguments[0]), [sys.executable, "-m", "jspec", *arguments[1:]])


if __name__ == "__main__":
    sys.exit(main())

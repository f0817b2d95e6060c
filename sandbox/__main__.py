"""`python -m sandbox`: run PostgreSQL and Kafka on this machine, until stopped or for one command."""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from sandbox import Sandbox, SandboxError, running_sandbox
from sandbox.guard import Guard
from sandbox.signals import on_stop_signals

DESCRIPTION = """\
Run a real PostgreSQL with the empty database `orders` and a real Kafka, on free ports of this machine.
When this program ends, even if it is killed, both servers and COMMAND end within 5 seconds, and their data is
removed.

Without COMMAND, print the ORDERS_... variables for the programs as NAME=value lines on stdout when both servers are
ready, and run until Ctrl-C, SIGTERM or the end of the terminal. With COMMAND, run it with these variables set, stop
both servers, and exit with the status of COMMAND (128 + n if signal n killed it). The processes that COMMAND leaves
in the background end, too, except those in a session of their own (setsid).
"""
#: How long a clean stop may take after the parent process has ended. Then this process exits and the guards take over.
ORPHAN_GRACE_S = 3.0
#: How long COMMAND has to stop after SIGTERM if this process was killed.
COMMAND_GRACE_S = 1.0
#: The signals of keys, which the terminal sends to all processes in the foreground.
_KEYS = (signal.SIGINT, signal.SIGQUIT)


class _Stopped(Exception):
    """A signal that stops the sandbox arrived while no command was running."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def main() -> int:
    """Run the command line; return the exit status."""
    options = _parse_options()
    on_stop_signals(_stop_once)
    threading.Thread(target=_end_with_parent, args=[os.getppid()], daemon=True).start()
    try:
        return _run(options.command, options.brokers)
    except _Stopped as stopped:
        return 128 + stopped.number if options.command else 0
    except (SandboxError, OSError) as error:  # OSError: disk full, too many open files
        print(f"sandbox: {error}", file=sys.stderr)
        return 1


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sandbox",
        usage="python -m sandbox [-h] [--brokers N] [-- COMMAND...]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--brokers",
        metavar="N",
        type=int,
        choices=range(1, 10),
        default=1,
        help="number of Kafka brokers (%(default)s)",
    )
    parser.add_argument("command", nargs="*", metavar="COMMAND", help="the command to run, with its arguments")
    options = parser.parse_args()
    if options.command and shutil.which(options.command[0]) is None:
        parser.error(f"no such command: {options.command[0]}")
    return options


def _run(command: Sequence[str], brokers: int) -> int:
    started_at = time.monotonic()
    print("sandbox: starting PostgreSQL and Kafka", file=sys.stderr)
    with running_sandbox(brokers) as sandbox:
        print(f"sandbox: both are ready after {time.monotonic() - started_at:.1f} s", file=sys.stderr)
        if command:
            return _run_command(command, sandbox)
        print("\n".join(f"{name}={value}" for name, value in sandbox.environ.items()), flush=True)
        while True:
            signal.pause()


def _run_command(command: Sequence[str], sandbox: Sandbox) -> int:
    early: list[int] = []
    on_stop_signals(lambda number, _: early.append(number))
    guard = Guard(signal.SIGTERM, grace_s=COMMAND_GRACE_S, find_orphans=True)
    process = subprocess.Popen(
        command,
        env={**os.environ, **sandbox.environ, **guard.environ},
        # So COMMAND never runs without its guard. This runs between fork and exec, and takes no lock.
        preexec_fn=lambda: guard.watch(os.getpid()),  # noqa: PLW1509
    )

    def forward(number: int, _: FrameType | None) -> None:
        if number not in _KEYS or not _is_in_foreground():
            process.send_signal(number)

    on_stop_signals(forward)
    for number in early:
        forward(number, None)
    status = process.wait()
    guard.end()  # it ends what COMMAND has left in the background
    return status if status >= 0 else 128 - status


def _stop_once(number: int, _: FrameType | None) -> NoReturn:
    on_stop_signals(signal.SIG_IGN)  # a second Ctrl-C must not interrupt the clean-up
    raise _Stopped(number)


def _is_in_foreground() -> bool:
    """Return whether Ctrl-C at the terminal reaches COMMAND directly, because it is in this process group."""
    try:
        with Path("/dev/tty").open() as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False


def _end_with_parent(parent: int) -> None:
    """Stop as on SIGTERM when the parent process has ended."""
    while os.getppid() == parent:
        time.sleep(0.25)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_GRACE_S)
    os._exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())

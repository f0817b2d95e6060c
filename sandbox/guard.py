"""Outlives its parent by a moment: ends the parent's server and removes the server's folder.

Run as a script of its own, `python -I -S guard.py FOLDER SIGNAL PARENT_PID`, one for each server, in a
session of its own. It reads lines on stdin: the pid of the process group to end when the time comes, 0 if
there is none just now. The time comes with the line `end`, or when the parent is no more, however it died.

It asks for its parent's pid four times a second because nothing else holds on every platform and in every
case: the pipe alone stays open as long as a child that the parent forked lives on.
"""

import argparse
import os
import select
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

POLL_S = 0.25
#: PostgreSQL needs a moment to end its own children; what has not gone by then is killed.
GRACE_S = 3.5


def main() -> None:
    """Wait for the end, then end the server and remove its folder."""
    parser = argparse.ArgumentParser(prog="python -m sandbox.guard", description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("signal", type=int)
    parser.add_argument("parent_pid", type=int)
    options = parser.parse_args()
    group = _last_group_named_by(options.parent_pid)
    if group:
        _end(group, options.signal)
    _remove(options.folder)


def _last_group_named_by(parent: int) -> int:
    group = 0
    while os.getppid() == parent:
        if not select.select([sys.stdin], [], [], POLL_S)[0]:
            continue
        # One read takes whole lines: each is written at once, and is shorter than a pipe's atomic write.
        lines = os.read(sys.stdin.fileno(), 4096).split()
        if not lines:
            break
        for line in lines:
            if line == b"end":
                return group
            group = int(line)
    return group


def _end(group: int, deadly_signal: int) -> None:
    # Gone; macOS says "not permitted" of a group of processes that have died and wait to be reaped.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, deadly_signal)
        os.killpg(group, signal.SIGCONT)  # a stopped process acts on no signal but SIGKILL
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline and not _is_zombie(group):
            os.killpg(group, 0)
            time.sleep(0.02)
        os.killpg(group, signal.SIGKILL)


def _is_zombie(pid: int) -> bool:
    # With its parent dead it is the system's to reap, and not every container's first process hurries to.
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    except OSError:  # gone, or not Linux
        return False
    return after_name.split()[0] == "Z"


def _remove(folder: str) -> None:
    # Again and again: a process on its way out may still be writing.
    deadline = time.monotonic() + GRACE_S
    while Path(folder).exists() and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.02)


if __name__ == "__main__":
    main()

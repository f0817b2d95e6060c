"""Kill a sandbox server and remove its folder when the parent process ends, even if the parent was killed.

`sandbox.server` starts one guard for each server, in a new session: `python -I -S guard.py FOLDER SIGNAL PARENT_PID`.
The guard reads lines from stdin. A number is the process group of the running server, 0 if none is running. The line
`end`, or the end of the parent, makes the guard kill that process group, remove the folder and exit.

The guard polls its parent's pid four times a second. The end of stdin alone is not enough: a child that the parent
forked may hold the pipe open.
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
#: How long a server has to end its children after SIGNAL. Then the guard sends SIGKILL.
GRACE_S = 3.5


def main() -> None:
    """Wait for `end` or for the end of the parent. Then kill the server and remove its folder."""
    parser = argparse.ArgumentParser(prog="python -m sandbox.guard", description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("signal", type=int)
    parser.add_argument("parent_pid", type=int)
    options = parser.parse_args()
    group = _wait_for_end(options.parent_pid)
    if group:
        _kill(group, options.signal)
    _remove(options.folder)


def _wait_for_end(parent: int) -> int:
    """Return the last process group that the parent named."""
    group = 0
    while os.getppid() == parent:
        if not select.select([sys.stdin], [], [], POLL_S)[0]:
            continue
        # A read returns complete lines: the parent writes each with one call, and short writes to a pipe are atomic.
        lines = os.read(sys.stdin.fileno(), 4096).split()
        if not lines:
            break
        for line in lines:
            if line == b"end":
                return group
            group = int(line)
    return group


def _kill(group: int, kill_signal: int) -> None:
    # The group has ended. If its processes are zombies, macOS reports "not permitted" instead.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, kill_signal)
        os.killpg(group, signal.SIGCONT)  # a stopped process handles no signal except SIGKILL
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline and not _is_zombie(group):
            os.killpg(group, 0)
            time.sleep(0.02)
        os.killpg(group, signal.SIGKILL)


def _is_zombie(pid: int) -> bool:
    # After its parent has ended, init must reap it, and the init of some containers does so late or never.
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    except OSError:  # it has ended, or this is not Linux
        return False
    return after_name.split()[0] == "Z"


def _remove(folder: str) -> None:
    # Repeatedly, because a process that is ending may still write files.
    deadline = time.monotonic() + GRACE_S
    while Path(folder).exists() and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.02)


if __name__ == "__main__":
    main()

"""Kill a process and remove its folder when the process that started it ends, even if that was killed.

`Guard` starts the guard process, in a new session: `python -I -S guard.py SIGNAL GRACE_S PARENT_PID [FOLDER]`.
It reads lines from stdin. A number is the process to kill, 0 if none is running. The line `end`, or the end of the
parent, makes it kill that process with its descendants, remove the folder and exit.

It polls its parent's pid four times a second. The end of stdin alone is not enough: a child that the parent forked may
hold the pipe open.
"""

import argparse
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

POLL_S = 0.25
#: How long a server has to end its children after its signal. Then the guard sends SIGKILL.
GRACE_S = 3.5


class Guard:
    """A process that ends the watched process, and removes a folder, within 5 s of the end of this process.

    It sends `kill_signal` to the watched process, and after `grace_s` SIGKILL to it and its descendants that are left.
    Descendants in another session are spared: they may have a guard of their own.
    """

    def __init__(self, kill_signal: signal.Signals, *, grace_s: float = GRACE_S, folder: Path | None = None) -> None:
        self._folder = folder
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-I", "-S", __file__, str(int(kill_signal)), str(grace_s), str(os.getpid())),
                *(() if folder is None else (folder,)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    def watch(self, pid: int) -> None:
        """Watch this process instead of the last one; 0 if none is running.

        Raises BrokenPipeError for a process if the guard was killed: no server may run without it.
        """
        try:
            self._send(str(pid))
        except BrokenPipeError:
            if pid:
                raise

    def end(self) -> None:
        """Kill the watched process, remove the folder, and end the guard.

        If the guard was killed, only remove the folder.
        """
        with suppress(BrokenPipeError):
            self._send("end")
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        if self._folder is not None:
            _remove(self._folder)

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        os.write(self._process.stdin.fileno(), f"{line}\n".encode())


def main() -> None:
    """Wait for `end` or for the end of the parent. Then kill the process and remove its folder."""
    parser = argparse.ArgumentParser(prog="python -m sandbox.guard", description=__doc__)
    parser.add_argument("signal", type=int)
    parser.add_argument("grace_s", type=float)
    parser.add_argument("parent_pid", type=int)
    parser.add_argument("folder", nargs="?")
    options = parser.parse_args()
    pid = _wait_for_end(options.parent_pid)
    if pid:
        _kill(pid, options.signal, options.grace_s)
    if options.folder:
        _remove(Path(options.folder))


def _wait_for_end(parent: int) -> int:
    """Return the last process that the parent named."""
    pid = 0
    while os.getppid() == parent:
        if not select.select([sys.stdin], [], [], POLL_S)[0]:
            continue
        # A read returns complete lines: the parent writes each with one call, and short writes to a pipe are atomic.
        lines = os.read(sys.stdin.fileno(), 4096).split()
        if not lines:
            break
        for line in lines:
            if line == b"end":
                return pid
            pid = int(line)
    return pid


def _kill(pid: int, kill_signal: int, grace_s: float) -> None:
    family = {pid}
    left = _still_running(family)
    _send_signal(pid, kill_signal)
    _send_signal(pid, signal.SIGCONT)  # a stopped process handles no signal except SIGKILL
    deadline = time.monotonic() + grace_s
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left = _still_running(family)
    for each in left:
        _send_signal(each, signal.SIGKILL)


def _still_running(family: set[int]) -> set[int]:
    """Add the descendants of a family to it, and return its processes that still run.

    A process whose parent has ended stays in the family. A zombie has ended; only its parent can remove it.
    """
    running = {pid: parent for pid, parent, state in _processes() if not state.startswith("Z")}
    added = family
    while added:
        added = {
            pid for pid, parent in running.items() if parent in family and _session(pid) == _session(parent)
        } - family
        family |= added
    return family & running.keys()


def _processes() -> Iterator[tuple[int, int, str]]:
    """Yield pid, parent and state of each process."""
    stats = list(Path("/proc").glob("[0-9]*/stat"))
    for path in stats:
        with suppress(OSError):  # it has ended
            state, parent, *_ = path.read_text(errors="replace").rpartition(")")[2].split()
            yield int(path.parent.name), int(parent), state
    if not stats:  # macOS
        table = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,state="], capture_output=True, text=True, check=True)
        for line in table.stdout.splitlines():
            pid, parent, state = line.split()
            yield int(pid), int(parent), state


def _session(pid: int) -> int | None:
    with suppress(ProcessLookupError, PermissionError):
        return os.getsid(pid)
    return None


def _send_signal(pid: int, number: int) -> None:
    # It has ended. If it is a zombie, macOS reports "not permitted" instead.
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _remove(folder: Path) -> None:
    # Repeatedly, because a process that is ending may still write files.
    deadline = time.monotonic() + GRACE_S
    while folder.exists() and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.02)


if __name__ == "__main__":
    main()

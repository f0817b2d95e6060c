"""Kill a process and remove its folder when the process that started it ends, even if that was killed.

`Guard` starts the guard process, in a new session:
`python -I -S guard.py SIGNAL GRACE_S PARENT_PID [--folder FOLDER] [--mark VARIABLE]`.
It reads lines from stdin. `PID SESSION` is the process to kill and its session, `0 0` if none is running. The line
`end`, or the end of the parent, makes it kill that process with its descendants, remove the folder and exit.

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
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

POLL_S = 0.25
#: How often a guard that finds orphans records which descendants run.
RECORD_S = 1.0
#: How long a server has to end its children after its signal. Then the guard sends SIGKILL.
GRACE_S = 3.5
#: How long the guard repeats SIGKILL, because a process may start another one before it receives the signal.
KILL_S = 0.25
#: The variables that mark processes begin with this.
MARK_PREFIX = "ORDERLIB_GUARD_"


class Guard:
    """A process that ends the watched process, and removes a folder, within 5 s of the end of this process.

    It sends `kill_signal` to the watched process or, if that has ended, to its descendants. After `grace_s` it sends
    SIGKILL to those that are left. Descendants in another session are spared: they may have a guard of their own.

    The parent of a descendant may have ended before. With `find_orphans`, the guard finds such a process by a variable
    in its environment, or because it has recorded the process earlier.
    """

    def __init__(
        self,
        kill_signal: signal.Signals,
        *,
        grace_s: float = GRACE_S,
        folder: Path | None = None,
        find_orphans: bool = False,
    ) -> None:
        self._folder = folder
        mark = f"{MARK_PREFIX}{os.urandom(8).hex()}"
        #: The variables that the watched process must get. Each guard has its own, so that guards can be nested.
        self.environ: Mapping[str, str] = {mark: "1"} if find_orphans else {}
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-I", "-S", __file__, str(int(kill_signal)), str(grace_s), str(os.getpid())),
                *(() if folder is None else ("--folder", folder)),
                *(("--mark", mark) if find_orphans else ()),
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
            self._send(f"{pid} {os.getsid(pid) if pid else 0}")
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


class Family:
    """The watched process and its descendants, without those in another session."""

    def __init__(self, mark: str | None = None) -> None:
        self.mark = mark
        self.watch(0, 0)

    def watch(self, pid: int, session: int) -> None:
        """Begin again with this process; 0 if none is running."""
        self.pid = pid
        self._session = session
        self._members = {pid} if pid else set()

    def running(self) -> set[int]:
        """Return its processes that still run, and record them.

        A process whose parent has ended stays in the family. A zombie has ended; only its parent can remove it.
        """
        parents = {
            pid: parent
            for pid, parent, state in _processes()
            if not state.startswith("Z") and _session(pid) == self._session
        }
        if self.mark is not None:
            self._members |= _marked(parents.keys() - self._members, self.mark)
        added = self._members
        while added:
            added = {pid for pid, parent in parents.items() if parent in self._members} - self._members
            self._members |= added
        # The pid of a process that has ended may be given to another one.
        self._members &= parents.keys()
        return set(self._members)


def main() -> None:
    """Wait for `end` or for the end of the parent. Then kill the process and remove its folder."""
    parser = argparse.ArgumentParser(prog="python -m sandbox.guard", description=__doc__)
    parser.add_argument("signal", type=int)
    parser.add_argument("grace_s", type=float)
    parser.add_argument("parent_pid", type=int)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--mark")
    options = parser.parse_args()
    family = Family(options.mark)
    _wait_for_end(options.parent_pid, family)
    if family.pid:
        _kill(family, options.signal, options.grace_s)
    if options.folder:
        _remove(options.folder)


def _wait_for_end(parent: int, family: Family) -> None:
    """Wait for `end` or for the end of the parent. The family is that of the last process that the parent named."""
    recorded_at = time.monotonic()
    while True:
        # What the parent wrote before its end is read, too.
        has_ended = os.getppid() != parent
        if select.select([sys.stdin], [], [], 0 if has_ended else POLL_S)[0]:
            # A read returns complete lines: the parent writes each with one call, and short writes to a pipe are
            # atomic.
            lines = os.read(sys.stdin.fileno(), 4096).splitlines()
            if not lines:
                return
            for line in lines:
                if line == b"end":
                    return
                pid, session = map(int, line.split())
                family.watch(pid, session)
        elif has_ended:
            return
        if family.mark is not None and family.pid and time.monotonic() - recorded_at > RECORD_S:
            family.running()
            recorded_at = time.monotonic()


def _kill(family: Family, kill_signal: int, grace_s: float) -> None:
    left = family.running()
    signalled: set[int] = set()
    deadline = time.monotonic() + grace_s
    while left and time.monotonic() < deadline:
        # The watched process ends its children itself. Those that it leaves get the signal, too.
        for pid in ({family.pid} if family.pid in left else left) - signalled:
            signalled.add(pid)
            _send_signal(pid, kill_signal)
            _send_signal(pid, signal.SIGCONT)  # a stopped process handles no signal except SIGKILL
        time.sleep(0.05)
        left = family.running()
    deadline = time.monotonic() + KILL_S
    while left and time.monotonic() < deadline:
        for pid in left:
            _send_signal(pid, signal.SIGKILL)
        time.sleep(0.02)
        left = family.running()


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


def _marked(pids: set[int], mark: str) -> set[int]:
    """Return those of the processes that have this variable in their environment."""
    if not pids:
        return set()
    if Path("/proc/self/environ").exists():
        return {pid for pid in pids if f"\0{mark}=".encode() in _environ(pid)}
    # macOS. It does not show the environment of its own programs, such as sh and sleep.
    command = ["ps", "-E", "-ww", "-o", "pid=,command=", "-p", ",".join(map(str, pids))]
    table = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    return {int(line.split()[0]) for line in table.stdout.splitlines() if f" {mark}=" in line}


def _environ(pid: int) -> bytes:
    with suppress(OSError):  # it has ended, or belongs to another user
        return b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    return b""


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

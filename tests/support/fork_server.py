"""Start programs by forking a process that has already imported them.

Importing a program takes most of a second of CPU, and the suite starts hundreds of programs. A forked program is still
a process with its own pid, environment and files. Some tests start a new interpreter instead, as a user does.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from tests.support import ROOT

#: Programs whose modules the fork server imports. The API imports gunicorn itself, which reads the environment then.
PROGRAMS = ("admin", "api", "consumer", "sender")

_lock = threading.Lock()


class Process:
    """A started program. Its methods are those of ``subprocess.Popen``."""

    def __init__(self, pid: int, status: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._status = status

    def poll(self) -> int | None:
        """Return the exit status, or ``None`` while the program runs."""
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status, or raise ``subprocess.TimeoutExpired``."""
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            self.returncode = int(os.read(self._status, 16))
            os.close(self._status)
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, unless the program has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL, unless the program has ended."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Send SIGTERM, unless the program has ended."""
        self.send_signal(signal.SIGTERM)


def start(
    arguments: Sequence[str],
    environ: Mapping[str, str],
    *,
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    checkout: Path = ROOT,
) -> Process:
    """Start ``python -m services.PROGRAM …`` or ``python -m MODULE …`` in a checkout.

    The streams are file descriptors; ``None`` is the null device.
    """
    status, status_end = os.pipe()
    with tempfile.TemporaryFile() as request, Path(os.devnull).open("r+b") as null:
        request.write(json.dumps([arguments, dict(environ)]).encode())
        request.seek(0)
        streams = [null.fileno() if stream is None else stream for stream in (stdin, stdout, stderr)]
        # One thread at a time: two answers could arrive as one.
        with _lock:
            control = _control(checkout)
            socket.send_fds(control, [b"!"], [request.fileno(), *streams, status_end])
            pid = int(control.recv(16))
        os.close(status_end)
        return Process(pid, status)


def prepare() -> None:
    """Start the fork server now, so that the first program does not wait for its imports."""
    _control(ROOT)


@functools.cache
def _control(checkout: Path) -> socket.socket:
    """Start the fork server of a checkout, and return the connection to it once it has imported the programs.

    It ends when the connection does.
    """
    control, remote = socket.socketpair()
    with remote:
        server = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve({remote.fileno()})"],
            cwd=checkout,
            stdin=subprocess.DEVNULL,
            pass_fds=[remote.fileno()],
        )

    def close() -> None:
        control.close()
        server.wait()

    atexit.register(close)
    control.recv(1)
    return control


def serve(control_fd: int) -> None:
    """Fork a program for each request until the connection ends. Return only in a forked process, which runs one."""
    control = socket.socket(fileno=control_fd)
    for program in PROGRAMS:
        importlib.import_module(f"services.{program}.__main__")
        # Python warns if it runs a module that is already imported.
        del sys.modules[f"services.{program}.__main__"]
    # Otherwise each forked process, as it ends, copies and collects all the modules: 0.2 s of CPU.
    gc.freeze()
    control.send(b"!")
    awake, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    status_ends: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([control.fileno(), awake], [], [])
        if awake in ready:
            os.read(awake, 64)
            for pid in list(status_ends):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    status_end = status_ends.pop(pid)
                    os.write(status_end, str(os.waitstatus_to_exitcode(status)).encode())
                    os.close(status_end)
        if control.fileno() in ready:
            message, files, _, _ = socket.recv_fds(control, 1, 5)
            if not message:
                os._exit(0)
            request, *streams, status_end = files
            if (pid := os.fork()) == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for number, stream in enumerate(streams):
                    os.dup2(stream, number)
                with open(request, "rb", closefd=False) as file:
                    arguments, environ = json.load(file)
                os.closerange(3, 1024)
                _become(arguments, environ)
                return
            status_ends[pid] = status_end
            for number in (request, *streams):
                os.close(number)
            control.send(str(pid).encode())


def _become(arguments: Sequence[str], environ: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environ)
    program, *rest = arguments
    sys.argv = [program, *rest]
    module = f"services.{program}" if program in PROGRAMS else program
    runpy.run_module(module, run_name="__main__", alter_sys=True)

"""The base class of both servers: folder, process, free port, and the guard that removes them with their parent."""

import contextlib
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, ClassVar, Self

from sandbox.guard import Guard

#: A server that cannot start ends by itself, so this limit is for one that hangs. A busy machine needs a minute.
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0
#: How many ports are tried if another process takes the chosen one before the server does.
PORT_ATTEMPTS = 5

# The new process waits in this shell until the guard knows its pid. If this process is killed before that, the shell
# reads the end of stdin and exits, so no server ever runs without a guard.
GATE = ("/bin/sh", "-c", 'read -r go && exec "$@" </dev/null', "sh")


class SandboxError(Exception):
    """The sandbox cannot start or continue. The message is for the person who started it."""


def free_port() -> int:
    """Return a free TCP port of 127.0.0.1.

    It lies below the ephemeral range, from which systems choose the ports of outgoing connections. In that range
    another connection could take the port of a stopped server, and a client that reconnects to a stopped server could
    get the server's port as its own and connect to itself.
    """
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port


def temporary_path(prefix: str) -> Path:
    """Return a path for a temporary folder that does not exist yet, so that its guard can run before it exists."""
    return Path(tempfile.gettempdir()) / f"{prefix}{secrets.token_hex(8)}"


class Server(ABC):
    """A server on a free port of 127.0.0.1, with its data in a temporary folder.

    As a context manager, it starts the server and closes it at the end. `stop` keeps port and data for the next
    `start`; `close` kills the server if it runs and removes the data. If this process ends without `close`, even by
    SIGKILL, its guard does the same within 5 s.
    """

    #: The product, for messages.
    name: ClassVar[str]
    #: The signal that ends it at once, without saving its data.
    _kill_signal: ClassVar[signal.Signals]
    #: The user that it runs as; None for the current user.
    _user: str | None = None
    _group: int | None = None

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._guard: Guard | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._choose_ports()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def _choose_ports(self) -> None:
        """Set the ports. They do not change after the first successful start."""

    @abstractmethod
    def _prepare(self, folder: Path) -> None:
        """Create the data in `folder`, once, before the first start."""

    @abstractmethod
    def _command(self, folder: Path) -> Sequence[str]:
        """Return the command that runs the server."""

    @abstractmethod
    def _is_ready(self) -> bool:
        """Return whether the running server accepts clients."""

    @abstractmethod
    def _finish_first_start(self) -> None:
        """Complete the first start, once the server is ready."""

    @property
    def pid(self) -> int:
        """The running server's process id. Raises SandboxError if it does not run."""
        if self._process is None:
            raise SandboxError(f"{self.name} is not running")
        return self._process.pid

    @property
    def folder(self) -> Path:
        """The folder of its data and its log. Raises SandboxError before the first start and after `close`."""
        if self._folder is None:
            raise SandboxError(f"{self.name} has not been started")
        return self._folder

    @property
    def log_path(self) -> Path:
        """The file with its stdout and stderr, of all its starts."""
        return self.folder / "server.log"

    def start(self) -> None:
        """Start it, and return when it is ready. After a stop, it uses the same port and data.

        Raises SandboxError with the end of its log if it does not become ready, after killing it.
        """
        if self._process is not None:
            raise SandboxError(f"{self.name} is running already")
        if self._folder is not None:
            self._launch()
            return
        try:
            self._create_folder()
            self._prepare(self.folder)
            self._launch_on_free_port()
            self._finish_first_start()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Kill the server and remove its folder. Idempotent."""
        if self._process is not None:
            self._end(self._kill_signal)
        if self._guard is not None:
            self._guard.end()
            self._guard = None
        self._folder = None

    def _create_folder(self) -> None:
        folder = temporary_path(f"orderlib-{self.name.lower()}-")
        self._guard = Guard(self._kill_signal, folder=folder)
        folder.mkdir(mode=0o700)
        self._folder = folder
        if self._user is not None:
            shutil.chown(self._folder, self._user)

    def _launch_on_free_port(self) -> None:
        for attempt in range(PORT_ATTEMPTS):
            try:
                self._launch()
            except SandboxError:
                port_was_taken = "Address already in use" in _tail(self.log_path)
                if not port_was_taken or attempt == PORT_ATTEMPTS - 1:
                    raise
                self.log_path.unlink()
                self._choose_ports()
            else:
                return

    def _launch(self) -> None:
        with self.log_path.open("ab") as log:
            self._process = self._spawn(self._command(self.folder), log)
        deadline = time.monotonic() + START_TIMEOUT_S
        try:
            while not self._is_ready():
                if self._process.poll() is not None:
                    raise SandboxError(f"{self.name} did not start; its log ends:\n{_tail(self.log_path)}")
                if time.monotonic() > deadline:
                    raise SandboxError(
                        f"{self.name} was not ready within {START_TIMEOUT_S:.0f} s; its log ends:\n"
                        f"{_tail(self.log_path)}"
                    )
                time.sleep(0.02)
        except BaseException:
            self._end(self._kill_signal)
            raise

    def _run(self, command: Sequence[str], log: Path) -> None:
        """Run a command to its end. Raises SandboxError with the end of its output if it fails."""
        with log.open("ab") as output:
            process = self._spawn(command, output)
        status = process.wait()
        self._watch(0)
        if status != 0:
            raise SandboxError(f"{Path(command[0]).name} failed with {status}; its output ends:\n{_tail(log)}")

    def _spawn(self, command: Sequence[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [*GATE, *command],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=self.folder,
            env={"LC_ALL": "C"},
            # Ctrl-C at a terminal must stop the programs that use the server first.
            start_new_session=True,
            user=self._user,
            group=self._group,
            extra_groups=None if self._user is None else [],
        )
        self._watch(process.pid)
        assert process.stdin is not None
        with process.stdin as gate:
            gate.write(b"go\n")
        return process

    def _end(self, first_signal: signal.Signals) -> None:
        """Send a signal to the server and wait until it has ended; after a timeout, send a stronger one."""
        assert self._process is not None
        for number in (first_signal, self._kill_signal, signal.SIGKILL):
            self._process.send_signal(number)
            self._process.send_signal(signal.SIGCONT)
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                continue
            break
        self._watch(0)
        self._process = None

    def _watch(self, pid: int) -> None:
        assert self._guard is not None
        self._guard.watch(pid)


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:])

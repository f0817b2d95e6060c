"""A proxy before PostgreSQL that knows just enough of its protocol to strike at a chosen moment."""

from __future__ import annotations

import enum
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from psycopg.conninfo import conninfo_to_dict, make_conninfo

AUTHENTICATED = b"\0\0\0\0"


class Moment(enum.Enum):
    """A moment in a connection's life; but for the first, in a batch's transaction."""

    #: PostgreSQL has let the client in, and the client has not heard it.
    READY = "connected"
    #: The client asks to begin; what it fetched is in its memory only.
    BEGIN = "after poll"
    #: It has sent some rows of a COPY.
    COPY = "in the transaction"
    #: It asks to commit, and PostgreSQL has not heard it.
    COMMIT = "before COMMIT"
    #: PostgreSQL has committed, and the client has not heard it.
    COMMITTED = "after COMMIT"


class Proxy:
    """Carries connections to a server until told otherwise.

    ``set_trap`` freezes a connection at the next such moment; ``trapped`` tells. Then ``release`` lets it go on, and
    ``drop`` ends it. While frozen, a connection is half-open: nobody hears anything, nobody is told.
    """

    def __init__(self, url: str) -> None:
        given = conninfo_to_dict(url)
        self._server = (str(given["host"]), int(given["port"] or 5432))
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        port = self._listener.getsockname()[1]
        #: Encryption would begin with an answer that is no message.
        self.url = make_conninfo(url, host="127.0.0.1", port=port, sslmode="disable", gssencmode="disable")
        self._flowing = threading.Event()
        self._flowing.set()
        self._lock = threading.Lock()
        self._ends: set[socket.socket] = set()
        self._trap: Moment | None = None
        self.trapped = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def set_trap(self, moment: Moment) -> None:
        """Freeze the next connection that comes to this moment."""
        self.trapped.clear()
        self._trap = moment

    def freeze(self) -> None:
        """Let nothing through, and tell nobody."""
        self._flowing.clear()

    def release(self) -> None:
        """Let everything go on that was held back."""
        self._flowing.set()

    def drop(self) -> None:
        """End every connection; what was held back never arrives. New ones may come."""
        with self._lock:
            ends, self._ends = self._ends, set()
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._flowing.set()

    def close(self) -> None:
        """End every connection, and take no more."""
        # close() alone would leave a thread in accept(), and the port open.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=[client], daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        connection = _Connection()
        with client, suppress(OSError), socket.create_connection(self._server) as server:
            with self._lock:
                self._ends |= {client, server}
            answers = threading.Thread(
                target=self._pump, args=[server, client, connection.on_answer], kwargs={"typed": True}, daemon=True
            )
            answers.start()
            self._pump(client, server, connection.on_request, typed=False)
            answers.join()

    def _pump(
        self, source: socket.socket, sink: socket.socket, moment_of: Callable[[bytes], Moment | None], *, typed: bool
    ) -> None:
        with suppress(OSError, EOFError):
            while True:
                message = _read_message(source, typed=typed)
                typed = True
                moment = moment_of(message)
                if moment is not None and moment is self._trap:
                    self._trap = None
                    self._flowing.clear()
                    self.trapped.set()
                self._flowing.wait()
                sink.sendall(message)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class _Connection:
    """Where a connection is in its transaction."""

    def __init__(self) -> None:
        self._has_copied = False

    def on_request(self, message: bytes) -> Moment | None:
        if message.startswith(b"Q") and message[5:].startswith(b"BEGIN"):
            self._has_copied = False
            return Moment.BEGIN
        if message.startswith(b"d"):
            self._has_copied = True
            return Moment.COPY
        if message.startswith(b"Q") and message[5:].startswith(b"COMMIT") and self._has_copied:
            return Moment.COMMIT
        return None

    def on_answer(self, message: bytes) -> Moment | None:
        if message.startswith(b"R") and message[5:] == AUTHENTICATED:
            return Moment.READY
        if message.startswith(b"C") and message[5:].startswith(b"COMMIT") and self._has_copied:
            return Moment.COMMITTED
        return None


def _read_message(source: socket.socket, *, typed: bool) -> bytes:
    """The next message; the first one of a client has no type."""
    head = _read(source, 5 if typed else 4)
    (length,) = struct.unpack("!I", head[-4:])
    return head + _read(source, length - 4)


def _read(source: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        if not (more := source.recv(size - len(data))):
            raise EOFError
        data += more
    return bytes(data)


@contextmanager
def proxy(url: str) -> Iterator[Proxy]:
    """A proxy for a test."""
    made = Proxy(url)
    try:
        yield made
    finally:
        made.close()

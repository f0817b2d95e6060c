"""A TCP proxy in front of PostgreSQL: it cuts, refuses or freezes connections, also at a chosen message."""

from __future__ import annotations

import enum
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from io import BufferedReader
from types import TracebackType
from typing import Self

from psycopg.conninfo import conninfo_to_dict, make_conninfo

from orderlib.postgres import queries

AUTHENTICATED = b"\0\0\0\0"


class Moment(enum.Enum):
    """A moment in a connection; all but the first are in the transaction of a batch."""

    #: PostgreSQL has accepted the client, which has not received that yet.
    READY = "connected"
    #: The client sends BEGIN; what it fetched is in its memory only.
    BEGIN = "after poll"
    #: It has sent some rows of a COPY.
    COPY = "in the transaction"
    #: It sends COMMIT, which PostgreSQL has not received yet.
    COMMIT = "before COMMIT"
    #: PostgreSQL has committed, and the client has not received that yet.
    COMMITTED = "after COMMIT"


class CutConnection(Exception):
    """Raised by ``on_message``: forward these bytes instead of the message, send the client a reply, end both sides."""

    def __init__(self, forward: bytes = b"", reply: bytes = b"") -> None:
        super().__init__()
        self.forward = forward
        self.reply = reply


class TcpProxy:
    """Forwards the messages of each connection to the server of a URL.

    ``on_message`` sees each message, and whether the client sent it, before it is forwarded; several threads call it.
    """

    def __init__(self, url: str, on_message: Callable[[bytes, bool], None] | None = None) -> None:
        server = conninfo_to_dict(url)
        self._server = (str(server["host"]), int(server["port"] or 5432))
        self._on_message = on_message
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self._port = self._listener.getsockname()[1]
        #: Encryption would begin with an answer that is not a message.
        self.url = make_conninfo(url, host="127.0.0.1", port=self._port, sslmode="disable", gssencmode="disable")
        #: How many statements clients have sent for execution, not counting those of the simple protocol.
        self.executed = 0
        #: Set once a connection is frozen at the moment of ``set_trap``.
        self.trapped = threading.Event()
        self._trap: Moment | None = None
        self._flowing = threading.Event()
        self._flowing.set()
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._start_accepting()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cut()

    def set_trap(self, moment: Moment) -> None:
        """Freeze when the next connection reaches this moment."""
        self.trapped.clear()
        self._trap = moment

    def freeze(self) -> None:
        """Accept connections and data, and forward nothing."""
        self._flowing.clear()

    def thaw(self) -> None:
        """Forward the held data, and what follows."""
        self._flowing.set()

    def drop(self) -> None:
        """End every connection; held data is lost. New connections are accepted."""
        with self._lock:
            sockets, self._sockets = self._sockets, set()
        for end in sockets:
            _shut_down(end)
        self.thaw()

    def cut(self) -> None:
        """End every connection and refuse new ones."""
        # close() alone leaves a thread in accept() and the port open.
        _shut_down(self._listener)
        self._listener.close()
        self.drop()

    def mend(self) -> None:
        """Accept connections again, on the same port."""
        self._listener = socket.create_server(("127.0.0.1", self._port), backlog=256)
        self._start_accepting()

    def _start_accepting(self) -> None:
        threading.Thread(target=self._accept, args=[self._listener], daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=[client], daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        connection = _Connection()
        with client, suppress(OSError):
            self._register(client)
            self._flowing.wait()
            with socket.create_connection(self._server) as server:
                self._register(server)
                for end in (client, server):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                answers = threading.Thread(
                    target=self._forward, args=[server, client, client, connection.on_answer], daemon=True
                )
                answers.start()
                self._forward(client, server, client, connection.on_request)
                answers.join()

    def _register(self, end: socket.socket) -> None:
        with self._lock:
            self._sockets.add(end)

    def _forward(
        self,
        source: socket.socket,
        sink: socket.socket,
        client: socket.socket,
        moment_of: Callable[[bytes], Moment | None],
    ) -> None:
        is_typed = source is not client
        with suppress(OSError, EOFError), source.makefile("rb") as stream:
            while True:
                message = _read_message(stream, is_typed=is_typed)
                is_typed = True
                self.executed += source is client and message.startswith(b"E")
                moment = moment_of(message)
                if moment is not None and moment is self._trap:
                    self._trap = None
                    self.freeze()
                    self.trapped.set()
                self._flowing.wait()
                try:
                    if self._on_message is not None:
                        self._on_message(message, source is client)
                except CutConnection as cut:
                    sink.sendall(cut.forward)
                    with suppress(OSError):
                        client.sendall(cut.reply)
                    _shut_down(source)
                    _shut_down(sink)
                    return
                sink.sendall(message)
        # The other direction ends when the other side has read this.
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


class _Connection:
    """The state of a connection's transaction."""

    def __init__(self) -> None:
        self._has_copied = False
        #: The text of each prepared statement, by its name.
        self._statements: dict[bytes, bytes] = {}

    def on_request(self, message: bytes) -> Moment | None:
        statement = self._executed(message)
        if statement == queries.BEGIN_WRITE.encode():
            self._has_copied = False
            return Moment.BEGIN
        if message.startswith(b"d"):
            self._has_copied = True
            return Moment.COPY
        if statement == queries.COMMIT.encode() and self._has_copied:
            return Moment.COMMIT
        return None

    def _executed(self, message: bytes) -> bytes | None:
        """Return the statement that a message of the client executes, if any."""
        if message.startswith(b"Q"):
            return message[5:-1]
        if message.startswith(b"P"):
            name, text, _ = message[5:].split(b"\0", 2)
            self._statements[name] = text
        elif message.startswith(b"B"):
            _, name, _ = message[5:].split(b"\0", 2)
            return self._statements.get(name)
        return None

    def on_answer(self, message: bytes) -> Moment | None:
        if message.startswith(b"R") and message[5:] == AUTHENTICATED:
            return Moment.READY
        if message.startswith(b"C") and message[5:].startswith(b"COMMIT") and self._has_copied:
            return Moment.COMMITTED
        return None


def _read_message(stream: BufferedReader, *, is_typed: bool) -> bytes:
    """Return the next message. The first one of a client has no type."""
    head = _read(stream, 5 if is_typed else 4)
    (length,) = struct.unpack("!I", head[-4:])
    return head + _read(stream, length - 4)


def _read(stream: BufferedReader, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


def _shut_down(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)

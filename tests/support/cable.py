"""A cable to PostgreSQL that a test can cut, freeze and listen to."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from psycopg.conninfo import conninfo_to_dict, make_conninfo


class Cable:
    """Carries connections to a server. Cut, it refuses them; frozen, it takes them and what they send, silently."""

    def __init__(self, url: str) -> None:
        given = conninfo_to_dict(url)
        self._server = (str(given["host"]), int(given["port"] or 5432))
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self._port = self._listener.getsockname()[1]
        self._flowing = threading.Event()
        self._flowing.set()
        self._ends: set[socket.socket] = set()
        self._lock = threading.Lock()
        #: How many statements went through, by what they were, as soon as a statement is asked to be executed.
        self.executed = 0
        self.url = make_conninfo(url, host="127.0.0.1", port=self._port)
        threading.Thread(target=self._accept, args=[self._listener], daemon=True).start()

    def freeze(self) -> None:
        """Nothing comes through any more, and nobody is told."""
        self._flowing.clear()

    def thaw(self) -> None:
        """What was held back goes on."""
        self._flowing.set()

    def cut(self) -> None:
        """End every connection and refuse new ones."""
        # close() alone leaves a thread in accept() and the port open.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._drop()

    def mend(self) -> None:
        """Take connections again, on the same port."""
        self._listener = socket.create_server(("127.0.0.1", self._port), backlog=256)
        threading.Thread(target=self._accept, args=[self._listener], daemon=True).start()

    def close(self) -> None:
        """Away with it."""
        self.cut()
        self.thaw()

    def _drop(self) -> None:
        with self._lock:
            for end in self._ends:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            self._ends.clear()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=[client], daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            self._flowing.wait()
            with socket.create_connection(self._server) as server:
                with self._lock:
                    self._ends |= {client, server}
                back = threading.Thread(target=self._pump, args=[server, client], daemon=True)
                back.start()
                self._pump(client, server, listening=True)
                back.join()

    def _pump(self, source: socket.socket, sink: socket.socket, *, listening: bool = False) -> None:
        heard = b""
        with suppress(OSError):
            while data := source.recv(65536):
                self._flowing.wait()
                if listening:
                    heard = self._listen(heard + data)
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def _listen(self, heard: bytes) -> bytes:
        """Count the Execute messages; the first message of a connection alone has no type."""
        while len(heard) >= 5:
            typeless = heard[0] == 0
            (length,) = struct.unpack_from("!I", heard, 0 if typeless else 1)
            end = length if typeless else length + 1
            if len(heard) < end:
                break
            self.executed += heard[:1] == b"E"
            heard = heard[end:]
        return heard


@contextmanager
def cable(url: str) -> Iterator[Cable]:
    """A cable for a test."""
    made = Cable(url)
    try:
        yield made
    finally:
        made.close()

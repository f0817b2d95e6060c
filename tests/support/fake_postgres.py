"""A server that refuses each connection with a chosen error, localized for a chosen language."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_SSL_REQUEST, _GSSENC_REQUEST = 80877103, 80877104


def error_response(sqlstate: str, message: str, severity: str = "FATAL") -> bytes:
    """Return an ErrorResponse. ``severity`` is localized, as PostgreSQL sends it."""
    fields = {"S": severity, "V": "FATAL", "C": sqlstate, "M": message, "F": "auth.c", "L": "1", "R": "auth_failed"}
    body = b"".join(name.encode() + value.encode() + b"\0" for name, value in fields.items()) + b"\0"
    return b"E" + struct.pack("!I", len(body) + 4) + body


@contextmanager
def refusing(answer: bytes) -> Iterator[int]:
    """Answer each startup message with these bytes and close the connection. Yield the port."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client, suppress(OSError):
                while True:
                    (length,) = struct.unpack("!I", client.recv(4, socket.MSG_WAITALL))
                    message = client.recv(length - 4, socket.MSG_WAITALL)
                    if struct.unpack("!I", message[:4])[0] not in {_SSL_REQUEST, _GSSENC_REQUEST}:
                        break
                    client.sendall(b"N")
                client.sendall(answer)
                client.shutdown(socket.SHUT_WR)
                client.recv(1)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)

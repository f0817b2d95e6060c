"""Find the security.protocol of a Kafka listener. librdkafka reports a wrong one only as a lost connection."""

from __future__ import annotations

import contextlib
import math
import socket
import ssl
import struct
import time

#: The timeout of connecting and of each read.
_PROBE_TIMEOUT_S = 1.0

#: The answer of a listener without SASL to a SASL handshake.
_ILLEGAL_SASL_STATE = 34


def expected_protocol(address: str, timeout_s: float = math.inf) -> str | None:
    """Return the security.protocol of the listener at host:port; ``None`` if it is not one of Kafka, or too slow."""
    until_s = time.monotonic() + timeout_s
    for over_tls in (False, True):
        if (remaining_s := until_s - time.monotonic()) <= 0:
            return None
        # UnicodeError is what Python raises for a name that no host can have, such as ``a..b``.
        with contextlib.suppress(OSError, UnicodeError, struct.error):
            needs_sasl = _needs_sasl(address, min(remaining_s, _PROBE_TIMEOUT_S), over_tls=over_tls)
            return ("SASL_" if needs_sasl else "") + ("SSL" if over_tls else "PLAINTEXT")
    return None


def certificate_problem(address: str, ca_location: str | None) -> str | None:
    """Return why the certificate does not verify, in OpenSSL's words; ``None`` if it does or cannot be read."""
    try:
        context = ssl.create_default_context(cafile=ca_location)
        host = _host_and_port(address)[0]
        with _connect(address) as connection, context.wrap_socket(connection, server_hostname=host):
            return None
    except ssl.SSLCertVerificationError as exc:
        return exc.verify_message
    except (OSError, UnicodeError):
        return None


def _needs_sasl(address: str, timeout_s: float, *, over_tls: bool) -> bool:
    """Send a SASL handshake with no mechanism, which every listener answers."""
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(_connect(address, timeout_s))
        if over_tls:
            # No certificate is verified, because the probe sends no secret and only checks whether TLS is expected.
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            connection = stack.enter_context(context.wrap_socket(connection))
        sasl_handshake, version, correlation = 17, 1, 11
        request = struct.pack(">hhihh", sasl_handshake, version, correlation, -1, 0)
        connection.sendall(struct.pack(">i", len(request)) + request)
        answer = b""
        while len(answer) < 10:
            if not (received := connection.recv(10 - len(answer))):
                raise ConnectionResetError
            answer += received
        _, answered, error = struct.unpack(">iih", answer)
        if answered != correlation:
            raise ConnectionResetError
        return bool(error != _ILLEGAL_SASL_STATE)


def _connect(address: str, timeout_s: float = _PROBE_TIMEOUT_S) -> socket.socket:
    return socket.create_connection(_host_and_port(address), timeout=timeout_s)


def _host_and_port(address: str) -> tuple[str, int]:
    """Split host:port, which a protocol may precede. The default port is 9092, as in librdkafka.

    Raises OSError if the port is invalid.
    """
    address = address.rpartition("://")[2]
    host, colon, port = address.rpartition(":")
    if not colon or port.endswith("]"):
        return address.strip("[]"), 9092
    if not port.isdecimal() or int(port) > 65535:
        raise OSError(f"not an address: {address}")
    return host.strip("[]"), int(port)

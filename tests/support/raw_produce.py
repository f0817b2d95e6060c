"""Send a produce request without a client library, with headers that no library accepts."""

from __future__ import annotations

import socket
import struct
import time

PRODUCE, VERSION = 0, 3


def produce(bootstrap_servers: str, topic: str, partition: int, value: bytes, header_names: list[bytes]) -> None:
    """Publish one record whose headers have these names, to the only broker. Fail if it is refused."""
    records = _batch(_record(value, header_names))
    request = b"".join(
        [
            struct.pack("!hhi", PRODUCE, VERSION, 1) + _string(b"raw"),
            struct.pack("!hhi", -1, -1, 10_000),  # no transaction; all replicas; ten seconds
            struct.pack("!i", 1) + _string(topic.encode()),
            struct.pack("!ii", 1, partition) + struct.pack("!i", len(records)) + records,
        ]
    )
    host, _, port = bootstrap_servers.partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection, connection.makefile("rb") as answers:
        connection.sendall(struct.pack("!i", len(request)) + request)
        (size,) = struct.unpack("!i", answers.read(4))
        answer = answers.read(size)
    # Correlation, one topic with its name, one partition with its number; then the error.
    (error,) = struct.unpack_from("!h", answer, 4 + 4 + 2 + len(topic.encode()) + 4 + 4)
    assert error == 0, f"Kafka refused the record: error {error}"


def _record(value: bytes, header_names: list[bytes]) -> bytes:
    headers = b"".join(_varint(len(name)) + name + _varint(1) + b"v" for name in header_names)
    body = b"\0" + _varint(0) * 2 + _varint(-1) + _varint(len(value)) + value + _varint(len(header_names)) + headers
    return _varint(len(body)) + body


def _batch(record: bytes) -> bytes:
    now_ms = int(time.time() * 1000)
    validated = struct.pack("!hiqqqhii", 0, 0, now_ms, now_ms, -1, -1, -1, 1) + record
    rest = struct.pack("!iBI", -1, 2, _crc32c(validated)) + validated
    return struct.pack("!qi", 0, len(rest)) + rest


def _string(text: bytes) -> bytes:
    return struct.pack("!h", len(text)) + text


def _varint(number: int) -> bytes:
    zigzag = (number << 1) ^ (number >> 63)
    encoded = bytearray()
    while zigzag > 0x7F:
        encoded.append(zigzag & 0x7F | 0x80)
        zigzag >>= 7
    return bytes([*encoded, zigzag])


def _crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF

"""A line of the sender's manifest: the sender writes it, and ``admin reconcile`` reads it."""

from __future__ import annotations

import msgspec


class ManifestLine(msgspec.Struct, frozen=True, kw_only=True):
    """An acknowledged record."""

    topic: str
    partition: int
    #: ``None`` if a broker was lost: Kafka has the record, and the sender does not know where.
    offset: int | None
    #: ``None`` if the record has no key.
    order_uid: str | None
    #: The SHA-256 of the value, in hexadecimal.
    sha256: str

    @classmethod
    def decode(cls, line: bytes) -> ManifestLine:
        """Return the line in a JSON text. Raises ValueError for any other text."""
        try:
            return msgspec.json.decode(line, type=cls)
        except (msgspec.MsgspecError, RecursionError) as exc:
            raise ValueError("not a line of a manifest") from exc

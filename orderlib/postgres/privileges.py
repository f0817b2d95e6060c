"""The four roles, and what each may do with the tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import LiteralString

#: The names of the roles are part of the contract. SQL spells them out, so that it can be run in psql.
OWNER: LiteralString = "orders_owner"
MIGRATOR: LiteralString = "orders_migrator"
WRITER: LiteralString = "orders_writer"
READER: LiteralString = "orders_reader"
ROLES = (OWNER, MIGRATOR, WRITER, READER)

#: The privileges on each table, by role. Migrations grant them when they create a table; `migrate` and `bootstrap`
#: restore them after a change. docs/run-in-production.md has the same table.
PRIVILEGES: Mapping[str, Mapping[str, tuple[LiteralString, ...]]] = {
    "orders": {
        WRITER: (
            "SELECT",
            "INSERT",
            "DELETE",
            "UPDATE (source_topic_id, source_partition, source_offset, source_time)",
        ),
        READER: ("SELECT",),
    },
    "delivery": {WRITER: ("SELECT", "INSERT"), READER: ("SELECT",)},
    "payment": {WRITER: ("SELECT", "INSERT"), READER: ("SELECT",)},
    "items": {WRITER: ("SELECT", "INSERT"), READER: ("SELECT",)},
    "order_originals": {WRITER: ("SELECT", "INSERT"), READER: ("SELECT",)},
    "consumer_groups": {WRITER: ("SELECT", "INSERT"), READER: ("SELECT",)},
    "consumer_offsets": {WRITER: ("SELECT", "INSERT", "UPDATE (next_offset, updated_at)"), READER: ("SELECT",)},
    "rejects": {
        WRITER: ("SELECT", "INSERT", "UPDATE (redriven_at, redrive_outcome)"),
        READER: (
            (
                "SELECT (topic_id, partition, record_offset, topic, record_time, code, faults, rejected_at, "
                "redriven_at, redrive_outcome)"
            ),
        ),
    },
    "erased": {WRITER: ("SELECT", "INSERT", "DELETE"), READER: ("SELECT",)},
    "forgotten": {WRITER: ("SELECT",), READER: ("SELECT",)},
    "reject_digests": {WRITER: (), READER: ("SELECT",)},
    "schema_migrations": {WRITER: ("SELECT",), READER: ("SELECT",)},
}


#: The variables with the URLs of the roles that programs log in as.
URL_VARIABLES: Mapping[str, str] = {
    MIGRATOR: "ORDERS_MIGRATOR_URL",
    WRITER: "ORDERS_DATABASE_URL",
    READER: "ORDERS_READER_URL",
}


def table_privileges(role: str) -> tuple[tuple[str, str], ...]:
    """Return the privileges (table, privilege) that a program of a role checks when it starts: those on whole tables.

    PostgreSQL checks those on columns when they are used.
    """
    return tuple(
        (table, privilege) for table, roles in PRIVILEGES.items() for privilege in roles[role] if "(" not in privilege
    )

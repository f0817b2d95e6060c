"""The servers of the benchmarks: always their own, so that a measurement touches no other data."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from sandbox import running_sandbox


@contextmanager
def own_servers() -> Iterator[dict[str, str]]:
    """Run PostgreSQL and Kafka, and yield the environment for programs that use them.

    The caller's ``ORDERS_…`` variables are left out: a benchmark empties tables.
    """
    environ = {name: value for name, value in os.environ.items() if not name.startswith("ORDERS_")}
    with running_sandbox() as sandbox:
        yield {**environ, **sandbox.environ}

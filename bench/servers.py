"""PostgreSQL and Kafka for the benchmarks. They empty tables, so they never use servers that run already."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from sandbox import Sandbox, running_sandbox


@contextmanager
def benchmark_servers() -> Iterator[dict[str, str]]:
    """Start PostgreSQL and Kafka, and yield the environment for programs that use them; stop both at the end.

    The environment contains none of the caller's ``ORDERS_…`` variables, so no benchmark can reach other data.
    """
    with benchmark_sandbox() as (_, environ):
        yield environ


@contextmanager
def benchmark_sandbox() -> Iterator[tuple[Sandbox, dict[str, str]]]:
    """Do the same, and yield the servers, too, for benchmarks that restart one."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("ORDERS_")}
    with running_sandbox() as sandbox:
        yield sandbox, {**environ, **sandbox.environ}

"""Run both servers, with the settings for the programs."""

import secrets
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import attrs

from sandbox.kafka import KafkaServer
from sandbox.postgres import PostgresServer


@attrs.frozen(kw_only=True)
class Sandbox:
    """A running PostgreSQL and a running Kafka."""

    postgres: PostgresServer
    kafka: KafkaServer
    #: The settings for the programs. `admin bootstrap` creates the roles of the URLs with their passwords.
    environ: Mapping[str, str] = attrs.field(repr=False)


@contextmanager
def running_sandbox() -> Iterator[Sandbox]:
    """Run both servers on free ports; at the end, stop them and remove their data.

    Raises SandboxError if one of them does not start, after stopping the other one.
    """
    with ExitStack() as stack:
        # Kafka starts on this thread, so that Ctrl-C interrupts the download of its jars.
        pool = stack.enter_context(ThreadPoolExecutor(1))
        postgres, kafka = PostgresServer(), KafkaServer()
        stack.callback(postgres.close)
        stack.callback(kafka.close)
        postgres_started = pool.submit(postgres.start)
        # If Kafka fails, wait for the start of PostgreSQL before closing it.
        stack.callback(postgres_started.exception)
        kafka.start()
        postgres_started.result()
        yield Sandbox(postgres=postgres, kafka=kafka, environ=_environ(postgres, kafka))


def _environ(postgres: PostgresServer, kafka: KafkaServer) -> Mapping[str, str]:
    return {
        "ORDERS_BOOTSTRAP_URL": postgres.superuser_url,
        "ORDERS_MIGRATOR_URL": postgres.url("orders_migrator", secrets.token_hex(16)),
        "ORDERS_DATABASE_URL": postgres.url("orders_writer", secrets.token_hex(16)),
        "ORDERS_READER_URL": postgres.url("orders_reader", secrets.token_hex(16)),
        "ORDERS_KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap_servers,
    }

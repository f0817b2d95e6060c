"""Run both servers, with the settings for the programs."""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import attrs

from sandbox.kafka import KafkaServer
from sandbox.postgres import PostgresServer


@attrs.frozen(kw_only=True)
class Sandbox:
    """A running PostgreSQL and a running Kafka."""

    postgres: PostgresServer
    #: The nodes of Kafka.
    brokers: Sequence[KafkaServer]
    #: The settings for the programs. `admin bootstrap` creates the roles of the URLs with their passwords.
    environ: Mapping[str, str] = attrs.field(repr=False)

    @property
    def kafka(self) -> KafkaServer:
        """The first node of Kafka, or the only one."""
        return self.brokers[0]


@contextmanager
def running_sandbox(brokers: int = 1, postgres: PostgresServer | None = None) -> Iterator[Sandbox]:
    """Run both servers on free ports, Kafka with this number of nodes; at the end, stop them and remove their data.

    `postgres` replaces the usual PostgreSQL.

    Raises SandboxError if one of them does not start, after stopping the others.
    """
    with ExitStack() as stack:
        # The first node starts on this thread, so that Ctrl-C interrupts the download of its jars.
        postgres, nodes = postgres or PostgresServer(), KafkaServer.cluster(brokers)
        servers = [postgres, *nodes[1:]]
        for server in (*servers, nodes[0]):
            stack.callback(server.close)
        # At its end it waits for each start, so that a server is closed only after that.
        pool = stack.enter_context(ThreadPoolExecutor(brokers))
        started = [pool.submit(server.start) for server in servers]
        nodes[0].start()
        for future in started:
            future.result()
        yield Sandbox(postgres=postgres, brokers=nodes, environ=_environ(postgres, nodes[0]))


def _environ(postgres: PostgresServer, kafka: KafkaServer) -> Mapping[str, str]:
    return {
        "ORDERS_BOOTSTRAP_URL": postgres.superuser_url,
        "ORDERS_MIGRATOR_URL": postgres.url("orders_migrator", secrets.token_hex(16)),
        "ORDERS_DATABASE_URL": postgres.url("orders_writer", secrets.token_hex(16)),
        "ORDERS_READER_URL": postgres.url("orders_reader", secrets.token_hex(16)),
        "ORDERS_KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap_servers,
    }

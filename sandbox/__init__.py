"""A real PostgreSQL and a real Kafka on this machine, without Docker, Java or Maven.

PostgreSQL and a Java come from Python packages; Kafka's jars are downloaded once. PostgreSQL starts with the empty
database `orders`, Kafka without topics. `admin bootstrap`, `migrate` and `topics` create roles, tables and topic.
"""

import sys

if sys.platform not in ("linux", "darwin"):
    sys.exit("the sandbox needs Linux or macOS; elsewhere, `docker compose up` runs the same servers")

# These modules import modules that only Unix has.
from sandbox.kafka import KafkaServer
from sandbox.postgres import PostgresServer
from sandbox.running import Sandbox, running_sandbox
from sandbox.server import SandboxError

__all__ = ["KafkaServer", "PostgresServer", "Sandbox", "SandboxError", "running_sandbox"]

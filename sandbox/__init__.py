"""A real PostgreSQL and a real Kafka on this machine, without Docker, Java or Maven being there.

Their programs come from Python packages and from Kafka's jars, which are fetched once. Both servers are
empty but for the database `orders`; `admin bootstrap`, `migrate` and `topics` do the rest.
"""

import sys

if sys.platform not in ("linux", "darwin"):
    sys.exit("the sandbox needs Linux or macOS; elsewhere, `docker compose up` runs the same servers")

# What follows needs a Unix already when it is imported.
from sandbox.kafka import KafkaServer
from sandbox.postgres import PostgresServer
from sandbox.running import Sandbox, running_sandbox
from sandbox.server import SandboxError

__all__ = ["KafkaServer", "PostgresServer", "Sandbox", "SandboxError", "running_sandbox"]

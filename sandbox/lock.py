"""`python -m sandbox.lock`: write `jars.lock` for the versions in this module."""

import argparse
import hashlib
import sys
import tempfile
from pathlib import Path

from jgo.maven import MavenContext

from sandbox.jars import LOCK

KAFKA_VERSION = "4.4.0"
ROOTS = (
    f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}",
    # Listed here, because otherwise an older version that another jar requires would be chosen.
    f"org.apache.kafka:kafka-clients:{KAFKA_VERSION}",
    # The smallest binding of slf4j. It is configured by system properties and writes to stderr, which is the log.
    # Its version is that of the slf4j-api that Kafka requires.
    "org.slf4j:slf4j-simple:1.7.36",
)
HEADING = "# Kafka's jars: coordinate and SHA-256. Written by `python -m sandbox.lock`; do not edit.\n"


def main() -> None:
    """Resolve the roots with their runtime dependencies, download them, and write their SHA-256."""
    argparse.ArgumentParser(prog="python -m sandbox.lock", description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as download:
        maven = MavenContext(repo_cache=Path(download))
        roots, others = maven.resolver.resolve([maven.create_dependency(root) for root in ROOTS])
        lines = []
        for jar in (dependency.artifact for dependency in [*roots, *others]):
            print(f"downloading {jar}", file=sys.stderr)
            sha256 = hashlib.sha256(jar.resolve().read_bytes()).hexdigest()
            lines.append(f"{jar.groupId}:{jar.artifactId}:{jar.version} {sha256}\n")
    LOCK.write_text("".join([HEADING, *sorted(lines)]))


if __name__ == "__main__":
    main()

"""`python -m sandbox.lock` writes `jars.lock` anew, for the versions named here."""

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
    # Wanted only by others, an older one would win.
    f"org.apache.kafka:kafka-clients:{KAFKA_VERSION}",
    # The smallest binding of slf4j, set by system properties alone; it writes to stderr, which is the log.
    # Of the version of the slf4j-api that Kafka wants.
    "org.slf4j:slf4j-simple:1.7.36",
)
HEADING = "# Kafka's jars: coordinate and SHA-256. Written by `python -m sandbox.lock`; do not edit.\n"


def main() -> None:
    """Resolve the roots and lock what they need to run, as it comes from the registry now."""
    argparse.ArgumentParser(prog="python -m sandbox.lock", description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as download:
        maven = MavenContext(repo_cache=Path(download))
        roots, others = maven.resolver.resolve([maven.create_dependency(root) for root in ROOTS])
        lines = []
        for jar in (dependency.artifact for dependency in [*roots, *others]):
            print(f"fetching {jar}", file=sys.stderr)
            sha256 = hashlib.sha256(jar.resolve().read_bytes()).hexdigest()
            lines.append(f"{jar.groupId}:{jar.artifactId}:{jar.version} {sha256}\n")
    LOCK.write_text("".join([HEADING, *sorted(lines)]))


if __name__ == "__main__":
    main()

"""Download Kafka's jars, exactly those in `jars.lock`, once for each user."""

import hashlib
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sandbox.cache import create_once
from sandbox.server import SandboxError

LOCK = Path(__file__).with_name("jars.lock")
#: Parallel downloads: enough to hide the latency of the registry without loading it.
PARALLEL_DOWNLOADS = 4


def installed_jars(cache: Path) -> list[Path]:
    """Return Kafka's jars in `cache`, and download them first if they are missing.

    Raises SandboxError if a download fails or a jar does not have the SHA-256 of `jars.lock`.
    """
    locked = read_lock()
    lock_digest = hashlib.sha256(LOCK.read_bytes()).hexdigest()[:12]
    folder = create_once(cache / f"kafka-jars-{lock_digest}", lambda folder: _download(locked, folder))
    jars = [folder / _jar_name(coordinate) for coordinate in locked]
    for jar, sha256 in zip(jars, locked.values(), strict=True):
        _check(jar, sha256)
    return jars


def read_lock() -> Mapping[str, str]:
    """Return the SHA-256 of each locked jar by its coordinate, `group:artifact:version`."""
    lines = [line.split() for line in LOCK.read_text().splitlines() if not line.startswith("#")]
    return dict(lines)


def _jar_name(coordinate: str) -> str:
    _, artifact, version = coordinate.split(":")
    return f"{artifact}-{version}.jar"


def _check(jar: Path, sha256: str) -> None:
    try:
        with jar.open("rb") as content:
            actual = hashlib.file_digest(content, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise SandboxError(f"{jar} is missing; remove its folder, and the next start downloads it again") from error
    if actual != sha256:
        raise SandboxError(
            f"{jar} is not the jar that sandbox/jars.lock names: its SHA-256 is {actual}, not {sha256}; "
            "remove its folder, and the next start downloads it again"
        )


def _download(locked: Mapping[str, str], folder: Path) -> None:
    from jgo.maven import MavenContext  # noqa: PLC0415 - its import takes 0.3 s, and only the first start needs it

    with tempfile.TemporaryDirectory(dir=folder) as repository:
        maven = MavenContext(repo_cache=Path(repository), timeout=60)

        def download(coordinate: str) -> None:
            try:
                jar = maven.create_dependency(coordinate).artifact.resolve()
            except (OSError, RuntimeError) as error:  # what jgo and requests raise
                raise SandboxError(f"cannot download {coordinate}: {error}") from error
            _check(jar, locked[coordinate])
            jar.rename(folder / _jar_name(coordinate))

        with ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool:
            try:
                for done, _ in enumerate(pool.map(download, locked), 1):
                    if done % 9 == 0:
                        print(f"downloading Kafka's jars, once, 43 MB: {done}/{len(locked)}", file=sys.stderr)
            finally:
                pool.shutdown(cancel_futures=True)

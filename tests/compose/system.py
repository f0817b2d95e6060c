"""The system of ``docker-compose.yml``, as its own project beside any other."""

from __future__ import annotations

import json
import secrets
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

from sandbox.server import free_port
from tests.compose.engine import ROOT, docker
from tests.support.waiting import wait_for

#: The services that end by themselves, and those that run until stopped.
JOBS = ("bootstrap", "migrate", "topics", "sender")
SERVICES = ("postgres", "kafka", "consumer", "api")
PROGRAMS = (*JOBS, "consumer", "api")

START_TIMEOUT_S = 180.0
RECOVERY_TIMEOUT_S = 90.0


@attrs.frozen(kw_only=True)
class System:
    """A running system."""

    #: The name of its compose project.
    name: str
    #: Settings as in ``.env``, with random secrets.
    settings: Mapping[str, str]
    _env_file: Path

    def compose(self, *arguments: str) -> str:
        """Run ``docker compose …`` and return its output. Raise AssertionError with its stderr if it fails."""
        return docker("compose", *self._options, *arguments)

    def run(self, *command: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """Run another container of a service with this command, until it ends."""
        return subprocess.run(self._run(*command), input=stdin, capture_output=True, check=False)

    @contextmanager
    def running(self, *command: str) -> Iterator[subprocess.Popen[bytes]]:
        """Like ``run``, during the block. After it, wait for the end of the command, which must have the status 0."""
        process = subprocess.Popen(self._run(*command), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            yield process
            _, errors = process.communicate(timeout=RECOVERY_TIMEOUT_S)
            assert process.returncode == 0, errors
        finally:
            process.kill()
            process.communicate()

    def state(self, service: str) -> dict[str, Any]:
        """Return docker's state of the container of a service: status, exit code, health."""
        return self.inspect(service)["State"]  # type: ignore[no-any-return] # JSON of docker

    def inspect(self, service: str) -> dict[str, Any]:
        """Return the output of ``docker inspect`` for the container of a service."""
        container = self.compose("ps", "--all", "--quiet", service)
        [found] = json.loads(docker("inspect", container))
        return found  # type: ignore[no-any-return] # JSON of docker

    def is_healthy(self, service: str) -> bool:
        """Whether its container is running and its health check passes."""
        state = self.state(service)
        return (state["Status"], state.get("Health", {}).get("Status")) == ("running", "healthy")

    def wait_until_up(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until the jobs have ended and the services are healthy."""
        wait_for(lambda: all(self.is_healthy(service) for service in SERVICES), timeout_s)
        wait_for(lambda: all(self.state(job)["Status"] == "exited" for job in JOBS), timeout_s)
        failed = [job for job in JOBS if self.state(job)["ExitCode"]]
        assert not failed, self.compose("logs", *failed)

    def kill(self, service: str) -> None:
        """Kill its container as a crash does. After ``docker kill``, docker would not restart it."""
        pid = self.state(service)["Pid"]
        kill = f"import os, signal; os.kill({pid}, signal.SIGKILL)"
        docker("run", "--rm", "--pid=host", "--user=0:0", "orderlib", "python", "-c", kill)

    def get(self, path: str, token: str | None) -> tuple[int, bytes]:
        """Request a path of the API from this machine. Return status and body."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.settings['API_PORT']}{path}")
        if token is not None:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as exc:
            return exc.code, exc.read()

    @property
    def token(self) -> str:
        """The token that allows to read orders."""
        return self.settings["ORDERS_API_TOKENS"].partition(":")[2]

    def _run(self, *command: str) -> list[str]:
        return ["docker", "compose", *self._options, "run", "--rm", "--no-deps", "-T", *command]

    @property
    def _options(self) -> list[str]:
        return ["--project-directory", str(ROOT), "--project-name", self.name, "--env-file", str(self._env_file)]


@contextmanager
def system(folder: Path) -> Iterator[System]:
    """Build the system and start it with random passwords on free ports. At the end, remove all except the image."""
    settings = {
        "POSTGRES_PASSWORD": secrets.token_hex(12),
        "MIGRATOR_PASSWORD": secrets.token_hex(12),
        "WRITER_PASSWORD": secrets.token_hex(12),
        "READER_PASSWORD": secrets.token_hex(12),
        "ORDERS_API_TOKENS": f"tests:{secrets.token_hex(12)}",
        "API_PORT": str(free_port()),
        "CONSUMER_METRICS_PORT": str(free_port()),
        "API_METRICS_PORT": str(free_port()),
    }
    env_file = folder / "env"
    env_file.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    created = System(name=f"orderlib-test-{secrets.token_hex(4)}", settings=settings, env_file=env_file)
    try:
        created.compose("up", "--detach", "--build")
        yield created
    except BaseException:
        print(created.compose("logs", "--tail", "50"))
        raise
    finally:
        created.compose("down", "--volumes", "--timeout", "15")

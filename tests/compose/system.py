"""The system of ``docker-compose.yml``, brought up under a name of its own beside whatever else runs."""

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
from tests.support.programs import wait_for

#: What ends by itself, and what runs for good; ``sender`` is neither here.
JOBS = ("bootstrap", "migrate", "topics", "sender")
SERVICES = ("postgres", "kafka", "consumer", "api")
PROGRAMS = (*JOBS, "consumer", "api")

START_WITHIN_S = 180.0
RECOVER_WITHIN_S = 90.0


@attrs.frozen(kw_only=True)
class System:
    """A running system."""

    #: Its project in compose.
    name: str
    #: Settings as in ``.env``; its secrets are no defaults.
    settings: Mapping[str, str]
    _env_file: Path

    def compose(self, *arguments: str) -> str:
        """What ``docker compose …`` prints. Fails the test, with what it said, if that does not work."""
        return docker("compose", *self._options, *arguments)

    def run(self, *command: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """Run a service once more, with this command, to its end."""
        return subprocess.run(self._run(*command), input=stdin, capture_output=True, check=False)

    @contextmanager
    def running(self, *command: str) -> Iterator[subprocess.Popen[bytes]]:
        """As ``run``, meanwhile; it must have ended with 0 by itself."""
        process = subprocess.Popen(self._run(*command), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            yield process
            _, errors = process.communicate(timeout=RECOVER_WITHIN_S)
            assert process.returncode == 0, errors
        finally:
            process.kill()
            process.communicate()

    def state(self, service: str) -> dict[str, Any]:
        """What docker knows about the container of a service: its status, its exit code, its health."""
        return self.inspect(service)["State"]  # type: ignore[no-any-return]

    def inspect(self, service: str) -> dict[str, Any]:
        """All that docker knows about the container of a service."""
        container = self.compose("ps", "--all", "--quiet", service)
        [found] = json.loads(docker("inspect", container))
        return found  # type: ignore[no-any-return]

    def is_healthy(self, service: str) -> bool:
        """Whether it runs, and its own check says that it works."""
        state = self.state(service)
        return (state["Status"], state.get("Health", {}).get("Status")) == ("running", "healthy")

    def wait_until_up(self, within_s: float = START_WITHIN_S) -> None:
        """Wait until the jobs are done and the rest is healthy."""
        wait_for(lambda: all(self.is_healthy(service) for service in SERVICES), within_s)
        wait_for(lambda: all(self.state(job)["Status"] == "exited" for job in JOBS), within_s)
        failed = [job for job in JOBS if self.state(job)["ExitCode"]]
        assert not failed, self.compose("logs", *failed)

    def kill(self, service: str) -> None:
        """End its container as a crash would. (``docker kill`` will not do: docker takes it for an operator's wish.)"""
        pid = self.state(service)["Pid"]
        kill = f"import os, signal; os.kill({pid}, signal.SIGKILL)"
        docker("run", "--rm", "--pid=host", "--user=0:0", "orderlib", "python", "-c", kill)

    def get(self, path: str, token: str | None) -> tuple[int, bytes]:
        """Ask the API, from outside; status and body."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.settings['API_PORT']}{path}")
        if token is not None:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as exc:
            return exc.code, exc.read()

    @property
    def token(self) -> str:
        """Who has it may read orders."""
        return self.settings["ORDERS_API_TOKENS"].partition(":")[2]

    def _run(self, *command: str) -> list[str]:
        return ["docker", "compose", *self._options, "run", "--rm", "--no-deps", "-T", *command]

    @property
    def _options(self) -> list[str]:
        return ["--project-directory", str(ROOT), "--project-name", self.name, "--env-file", str(self._env_file)]


@contextmanager
def system(folder: Path) -> Iterator[System]:
    """Build it and bring it up with new passwords on free ports; nothing of it is left at the end but the image."""
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
    made = System(name=f"orderlib-test-{secrets.token_hex(4)}", settings=settings, env_file=env_file)
    try:
        made.compose("up", "--detach", "--build")
        yield made
    except BaseException:
        print(made.compose("logs", "--tail", "50"))
        raise
    finally:
        made.compose("down", "--volumes", "--timeout", "15")

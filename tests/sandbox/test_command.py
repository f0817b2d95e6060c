"""`python -m sandbox` as a person or a Makefile sees it, and what is left when it is gone."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from sandbox.jars import installed_jars, read_lock, user_cache
from sandbox.lock import ROOTS
from tests.support.process_table import eventually, listens, processes_of

SANDBOX = (sys.executable, "-m", "sandbox")
CHECKOUT = Path(__file__).parents[2]
READY_WITHIN_S = 60
GONE_WITHIN_S = 5
NAMES = {
    "ORDERS_BOOTSTRAP_URL",
    "ORDERS_MIGRATOR_URL",
    "ORDERS_DATABASE_URL",
    "ORDERS_READER_URL",
    "ORDERS_KAFKA_BOOTSTRAP_SERVERS",
}


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder for temporary files that a server under another user reaches as well, unlike pytest's."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def environment(temporary: Path) -> Mapping[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ORDERS_")}
    return {**kept, "TMPDIR": str(temporary)}


def start(*arguments: str, temporary: Path) -> subprocess.Popen[str]:
    # A session of its own, as under a supervisor: no terminal sends it anything.
    return subprocess.Popen(
        [*SANDBOX, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        cwd=CHECKOUT,
        env=environment(temporary),
        start_new_session=True,
    )


def run(*arguments: str, temporary: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*SANDBOX, *arguments],
        capture_output=True,
        text=True,
        cwd=CHECKOUT,
        env=environment(temporary),
        timeout=READY_WITHIN_S,
        check=False,
    )


def variables(lines: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in lines.splitlines() if line.startswith("ORDERS_"))


def printed_variables(process: subprocess.Popen[str]) -> dict[str, str]:
    """Wait for the lines of a running `python -m sandbox`."""
    assert process.stdout is not None
    return variables("".join(process.stdout.readline() for _ in NAMES))


def ports_in(found: Mapping[str, str]) -> list[int]:
    database, kafka = found["ORDERS_DATABASE_URL"], found["ORDERS_KAFKA_BOOTSTRAP_SERVERS"]
    return [int(database.rpartition(":")[2].partition("/")[0]), int(kafka.rpartition(":")[2])]


def nothing_is_left(temporary: Path, ports: Sequence[int]) -> bool:
    return not (any(temporary.iterdir()) or any(map(listens, ports)) or processes_of(temporary))


def test_a_command_gets_the_variables_and_gives_its_status(temporary: Path) -> None:
    done = run("--", "sh", "-c", "env; exit 7", temporary=temporary)
    assert done.returncode == 7
    found = variables(done.stdout)
    assert set(found) == NAMES
    assert nothing_is_left(temporary, ports_in(found))


def test_sigterm_ends_the_command_and_gives_128_and_its_number(temporary: Path) -> None:
    with start("--", "sh", "-c", "env; echo ready; exec sleep 60", temporary=temporary) as process:
        assert process.stdout is not None
        found = variables("".join(iter(process.stdout.readline, "ready\n")))
        process.terminate()
        assert process.wait(GONE_WITHIN_S) == 128 + signal.SIGTERM
    assert nothing_is_left(temporary, ports_in(found))


def test_two_at_once_do_not_clash_and_leave_nothing_on_sigterm_or_on_sigkill(temporary: Path) -> None:
    with start(temporary=temporary) as asked, start(temporary=temporary) as killed:
        of_asked, of_killed = printed_variables(asked), printed_variables(killed)
        assert set(of_asked) == set(of_killed) == NAMES
        assert not set(of_asked.values()) & set(of_killed.values())
        asked.terminate()
        assert asked.wait(GONE_WITHIN_S) == 0
        assert not any(map(listens, ports_in(of_asked)))
        assert all(map(listens, ports_in(of_killed)))
        assert processes_of(temporary)
        killed.kill()
        assert eventually(
            lambda: nothing_is_left(temporary, [*ports_in(of_asked), *ports_in(of_killed)]), GONE_WITHIN_S
        )


def test_it_ends_when_its_parent_dies(temporary: Path) -> None:
    with subprocess.Popen(
        ["sh", "-c", f"{sys.executable} -m sandbox & wait"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=CHECKOUT,
        env=environment(temporary),
    ) as shell:
        found = printed_variables(shell)
        shell.kill()
        assert eventually(lambda: nothing_is_left(temporary, ports_in(found)), GONE_WITHIN_S)


def test_servers_end_with_their_parent_though_a_child_it_forked_lives_on(temporary: Path) -> None:
    script = """
import os, signal, sys, time
from sandbox import PostgresServer
with PostgresServer() as postgres:
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    print(child, postgres.port, flush=True)
    signal.pause()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        cwd=CHECKOUT,
        env=environment(temporary),
    ) as parent:
        assert parent.stdout is not None
        child, port = map(int, parent.stdout.readline().split())
        parent.kill()
        try:
            assert eventually(lambda: nothing_is_left(temporary, [port]), GONE_WITHIN_S)
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_corrupted_jar_is_refused_in_one_line_and_nothing_is_left_running(temporary: Path) -> None:
    jars = installed_jars(user_cache())
    copies = temporary / "cache" / "orderlib" / jars[0].parent.name
    copies.mkdir(parents=True)
    for jar in jars[1:]:
        (copies / jar.name).symlink_to(jar)
    (copies / jars[0].name).write_bytes(jars[0].read_bytes()[:-1] + b"!")
    scratch = temporary / "scratch"
    scratch.mkdir()
    done = subprocess.run(
        [*SANDBOX, "--", "true"],
        capture_output=True,
        text=True,
        cwd=CHECKOUT,
        env={**environment(scratch), "XDG_CACHE_HOME": str(temporary / "cache")},
        check=False,
    )
    assert done.returncode == 1
    _, refusal = done.stderr.splitlines()
    assert f"{jars[0].name} is not the jar that sandbox/jars.lock names" in refusal
    assert not any(scratch.iterdir())


def test_the_lock_is_of_the_versions_that_are_asked_for() -> None:
    assert set(ROOTS) <= set(read_lock())


@pytest.mark.parametrize("wrong", [["--", "no-such-command"], ["--no-such-option"]])
def test_usage_errors_exit_2_before_anything_starts(temporary: Path, wrong: list[str]) -> None:
    done = run(*wrong, temporary=temporary)
    assert (done.returncode, done.stdout) == (2, "")
    assert "starting" not in done.stderr


@pytest.mark.parametrize(("module", "says"), [("sandbox", "COMMAND"), ("sandbox.lock", "jars.lock")])
def test_help_says_what_it_is_for_and_does_nothing_else(module: str, says: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], capture_output=True, text=True, cwd=CHECKOUT, check=True
    )
    assert says in done.stdout
    assert done.stderr == ""


def test_elsewhere_than_on_linux_and_macos_it_says_so_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.platform = 'win32'; import sandbox"],
        capture_output=True,
        text=True,
        cwd=CHECKOUT,
        check=False,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("the sandbox needs Linux or macOS")

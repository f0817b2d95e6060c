"""`python -m sandbox`: output, exit status, and that nothing remains after its end."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil
import pytest

from sandbox.cache import user_cache
from sandbox.jars import installed_jars, read_lock
from sandbox.lock import ROOTS
from tests.support.process_table import listens, processes_of
from tests.support.waiting import wait_for

SANDBOX = (sys.executable, "-m", "sandbox")
CHECKOUT = Path(__file__).parents[2]
READY_TIMEOUT_S = 60
REMOVED_TIMEOUT_S = 5
NAMES = {
    "ORDERS_BOOTSTRAP_URL",
    "ORDERS_MIGRATOR_URL",
    "ORDERS_DATABASE_URL",
    "ORDERS_READER_URL",
    "ORDERS_KAFKA_BOOTSTRAP_SERVERS",
}


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder for temporary files that, unlike pytest's, a server of another user can read."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def environment(temporary: Path) -> Mapping[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ORDERS_")}
    return {**inherited, "TMPDIR": str(temporary)}


def start(*arguments: str, temporary: Path) -> subprocess.Popen[str]:
    # In a new session, as under a supervisor: no terminal sends it signals.
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
        timeout=READY_TIMEOUT_S,
        check=False,
    )


def variables(lines: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in lines.splitlines() if line.startswith("ORDERS_"))


def printed_variables(process: subprocess.Popen[str]) -> dict[str, str]:
    """Wait for the variables that a running `python -m sandbox` prints."""
    assert process.stdout is not None
    return variables("".join(process.stdout.readline() for _ in NAMES))


def stubborn_command(folder: Path) -> list[str]:
    """Return arguments for a command that prints the variables, ignores signals, and works with a child in a folder."""
    script = 'trap "" INT TERM; cd "$0" && env | grep ^ORDERS_ && sleep 600; true'
    return ["--", "sh", "-c", script, str(folder)]


def ports_in(found: Mapping[str, str]) -> list[int]:
    database, kafka = found["ORDERS_DATABASE_URL"], found["ORDERS_KAFKA_BOOTSTRAP_SERVERS"]
    return [int(database.rpartition(":")[2].partition("/")[0]), int(kafka.rpartition(":")[2])]


def nothing_remains(temporary: Path, ports: Sequence[int]) -> bool:
    return not (any(temporary.iterdir()) or any(map(listens, ports)) or processes_of(temporary))


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def run_command_alone(*command: str) -> subprocess.Popen[str]:
    """Run a command as `python -m sandbox` does, without servers."""
    script = """
import sys, types
from sandbox.__main__ import _run_command
sys.exit(_run_command(sys.argv[1:], types.SimpleNamespace(environ={})))
"""
    return subprocess.Popen(
        [sys.executable, "-c", script, *command],
        stdout=subprocess.PIPE,
        text=True,
        cwd=CHECKOUT,
        start_new_session=True,
    )


def test_the_status_of_a_command_is_returned() -> None:
    with run_command_alone("sh", "-c", "exit 7") as process:
        assert process.wait() == 7


@pytest.mark.parametrize("end", ["exit 0", "kill -9 $$"])
def test_what_a_command_leaves_in_the_background_ends_with_it(end: str) -> None:
    with run_command_alone("sh", "-c", f"sleep 600 & echo $!; {end}") as process:
        assert process.stdout is not None
        left = int(process.stdout.readline())
        assert process.wait(REMOVED_TIMEOUT_S) == (0 if end == "exit 0" else 128 + signal.SIGKILL)
        wait_for(lambda: not is_running(left), REMOVED_TIMEOUT_S)


def test_processes_whose_parents_were_killed_end_with_the_sandbox() -> None:
    command = """
import subprocess, time
print(subprocess.Popen(["sleep", "600"], process_group=0).pid, flush=True)
time.sleep(600)
"""
    with run_command_alone(sys.executable, "-c", command) as process:
        assert process.stdout is not None
        left = int(process.stdout.readline())
        assert is_running(left)
        os.killpg(process.pid, signal.SIGKILL)
        wait_for(lambda: not is_running(left), REMOVED_TIMEOUT_S)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_a_command_gets_each_signal_that_stops_the_sandbox(number: signal.Signals) -> None:
    command = f"""
import signal
signal.signal({int(number)}, lambda *_: exit(5))
print("ready", flush=True)
signal.pause()
"""
    with run_command_alone(sys.executable, "-c", command) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.wait(REMOVED_TIMEOUT_S) == 5


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGQUIT])
def test_a_closed_terminal_stops_a_start_cleanly(temporary: Path, number: signal.Signals) -> None:
    with start(temporary=temporary) as process:
        wait_for(lambda: list(temporary.iterdir()), READY_TIMEOUT_S)
        process.send_signal(number)
        assert process.wait(READY_TIMEOUT_S) == 0
        wait_for(lambda: nothing_remains(temporary, []), REMOVED_TIMEOUT_S, describe=lambda: list(temporary.iterdir()))


def test_a_closed_terminal_is_ignored_below_nohup() -> None:
    script = """
import signal
from sandbox.signals import on_stop_signals
signal.signal(signal.SIGHUP, signal.SIG_IGN)
on_stop_signals(lambda *_: exit(5))
signal.raise_signal(signal.SIGHUP)
signal.raise_signal(signal.SIGTERM)
"""
    assert subprocess.run([sys.executable, "-c", script], cwd=CHECKOUT, check=False).returncode == 5


def test_a_command_gets_the_variables_and_signals_and_its_status_after_one_is_128_plus_its_number(
    temporary: Path,
) -> None:
    with start("--", "sh", "-c", "env; echo ready; exec sleep 60", temporary=temporary) as process:
        assert process.stdout is not None
        found = variables("".join(iter(process.stdout.readline, "ready\n")))
        assert set(found) == NAMES
        process.terminate()
        assert process.wait(REMOVED_TIMEOUT_S) == 128 + signal.SIGTERM
    assert nothing_remains(temporary, ports_in(found))


def test_two_sandboxes_do_not_clash_and_nothing_remains_after_sigterm_or_sigkill(temporary: Path) -> None:
    with start(temporary=temporary) as stopped, start(*stubborn_command(temporary), temporary=temporary) as killed:
        of_stopped, of_killed = printed_variables(stopped), printed_variables(killed)
        assert set(of_stopped) == set(of_killed) == NAMES
        assert not set(of_stopped.values()) & set(of_killed.values())
        stopped.terminate()
        assert stopped.wait(REMOVED_TIMEOUT_S) == 0
        assert not any(map(listens, ports_in(of_stopped)))
        assert all(map(listens, ports_in(of_killed)))
        assert processes_of(temporary)
        killed.kill()
        wait_for(lambda: nothing_remains(temporary, [*ports_in(of_stopped), *ports_in(of_killed)]), REMOVED_TIMEOUT_S)


def test_it_ends_when_its_parent_is_killed(temporary: Path) -> None:
    with subprocess.Popen(
        ["sh", "-c", '"$@" & wait', "sh", *SANDBOX, *stubborn_command(temporary)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=CHECKOUT,
        env=environment(temporary),
    ) as shell:
        found = printed_variables(shell)
        shell.kill()
        wait_for(lambda: nothing_remains(temporary, ports_in(found)), REMOVED_TIMEOUT_S)


def test_servers_end_with_their_parent_even_if_a_forked_child_still_runs(temporary: Path) -> None:
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
            wait_for(lambda: nothing_remains(temporary, [port]), REMOVED_TIMEOUT_S)
        finally:
            os.kill(child, signal.SIGKILL)


def test_nothing_remains_if_the_very_first_start_is_killed(temporary: Path) -> None:
    cache, scratch = temporary / "cache" / "orderlib", temporary / "scratch"
    cache.mkdir(parents=True)
    scratch.mkdir()
    scratch.chmod(0o755)
    jars = installed_jars(user_cache())[0].parent
    (cache / jars.name).symlink_to(jars)
    environ = {**environment(scratch), "XDG_CACHE_HOME": str(cache.parent)}
    with subprocess.Popen(SANDBOX, cwd=CHECKOUT, env=environ, start_new_session=True) as process:
        wait_for(lambda: any("StorageTool" in each for each in processes_of(scratch)), READY_TIMEOUT_S)
        process.kill()
        wait_for(lambda: nothing_remains(scratch, []), REMOVED_TIMEOUT_S, describe=lambda: list(scratch.iterdir()))


def test_a_corrupted_jar_is_refused_in_one_line_and_no_server_remains(temporary: Path) -> None:
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
    _, message = done.stderr.splitlines()
    assert f"{jars[0].name} is not the jar that sandbox/jars.lock names" in message
    assert not any(scratch.iterdir())


def test_the_lock_contains_the_configured_versions() -> None:
    assert set(ROOTS) <= set(read_lock())


@pytest.mark.parametrize("wrong", [["--", "no-such-command"], ["--no-such-option"]])
def test_usage_errors_exit_2_before_anything_starts(temporary: Path, wrong: list[str]) -> None:
    done = run(*wrong, temporary=temporary)
    assert (done.returncode, done.stdout) == (2, "")
    assert "starting" not in done.stderr


def test_on_other_systems_it_names_the_supported_ones_in_one_line() -> None:
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

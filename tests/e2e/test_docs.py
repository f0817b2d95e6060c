"""The examples in the documents work as shown, and their lists are complete."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import attrs
import psycopg
import pytest
from confluent_kafka.admin import AdminClient, NewTopic

from sandbox import Sandbox
from sandbox.server import free_port
from services import settings as config
from services.admin.__main__ import make_parser
from tests.support import ROOT
from tests.support.consumer_process import consuming
from tests.support.databases import Database

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = ROOT / "docs"
SETTINGS = (DOCS / "settings.md").read_text(encoding="utf-8")
PAGES = sorted(DOCS.glob("*.md"))


def test_the_example_of_the_readme_runs(environ: dict[str, str]) -> None:
    [block] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", block], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['b563feb7b2b84b6test']\n"


def test_settings_md_lists_every_setting_with_its_default() -> None:
    listed = dict(re.findall(r"^\| `(ORDERS_[A-Z_]+)` \|.*\| (.*?) ?\|$", SETTINGS, re.MULTILINE))
    defaults = {name: f"`{default}`" if default else "" for name, default in config.DEFAULTS.items()}
    defaults["ORDERS_METRICS_BIND"] = f"consumer `{config.CONSUMER_METRICS_BIND}`, API `{config.API_METRICS_BIND}`"
    assert listed == {**defaults, "ORDERS_KAFKA_X_Y": ""}


def test_every_setting_that_a_program_names_has_an_entry_with_its_default() -> None:
    sources = [ROOT / "orderlib" / "commands.py", *(ROOT / "services").rglob("*.py")]
    named = {
        name
        for source in sources
        for name in re.findall(r"\bORDERS_[A-Z_]+[A-Z]\b", source.read_text(encoding="utf-8"))
        if not name.startswith("ORDERS_KAFKA_") or name == "ORDERS_KAFKA_BOOTSTRAP_SERVERS"
    }
    assert named == config.DEFAULTS.keys()


def test_settings_md_lists_exactly_the_admin_commands() -> None:
    commands = set(re.findall(r"^    ([a-z]+)(?: |$)", make_parser().format_help(), re.MULTILINE))
    [line] = [line for line in SETTINGS.splitlines() if "services.admin`" in line]
    assert set(re.findall(r"`([a-z]+)`", line)) == commands


def test_make_help_describes_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    [phony] = re.findall(r"^\.PHONY: help (.*)$", makefile, re.MULTILINE)
    described = set(re.findall(r'@echo "make ([a-z-]+)', makefile))
    assert described == set(phony.split())


@pytest.mark.parametrize(
    "document", [ROOT / "README.md", ROOT / "DESIGN.md", ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda page: page.name
)
def test_every_file_that_a_document_names_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    named = re.findall(r"`((?:orderlib|services|sandbox|tests|bench|docs|monitoring)/[\w./-]+)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_index_has_every_page() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\(([\w-]+\.md)\)", index)) == {page.name for page in PAGES} - {"README.md"}
    assert "(docs/README.md)" in README


@pytest.mark.parametrize(
    "page", [*ROOT.glob("*.md"), *PAGES, ROOT / "examples" / "README.md"], ids=lambda page: page.name
)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!http)([^)#\s]*)#?([^)\s]*)\)", page.read_text(encoding="utf-8")):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


#: The placeholders in commands, with an example of each.
PLACEHOLDERS = {"N": "0", "OFFSET": "0", "UID": "someone", "TOPIC/PARTITION/OFFSET": "orders/0/0", "CODE": "too_large"}


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_admin_accepts_every_command_of_a_page(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for command in re.findall(r"(?:services\.admin|--rm admin) ([a-z][^\n`#|&;>]*)", text):
        arguments = [PLACEHOLDERS.get(argument, argument) for argument in command.split()]
        assert make_parser().parse_args(arguments).command is not None, command


@attrs.frozen
class Block:
    """A fenced block of a page: ``sh`` and ``python`` are run, ``text`` is the output of the block before it."""

    language: str
    text: str


def blocks(page: str) -> list[Block]:
    """Return the fenced blocks of a page. Commands that no test can run are indented instead."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [Block(*block) for block in found]


# Sybil was tried with use-the-library.md. It makes each block a test, but the blocks build on each other: under
# pytest-xdist 15 of 22 failed, and in one process each block got a new, empty database. Evaluating the page in one test
# avoids that, but needs evaluators for output longer than the test below, and the shell pages need this code anyway.

#: Printed after each block, to separate their output.
END_OF_BLOCK = "=== end of block ==="


def assert_shown(page_blocks: list[Block], output: str) -> None:
    """Check that the output of each block has the lines of the ``text`` after it. … matches any text.

    The lines may have another order: that of rejects depends on the consumer's batches.
    """
    outputs = iter(output.split(f"{END_OF_BLOCK}\n"))
    shown = ""
    for block in page_blocks:
        if block.language != "text":
            shown = next(outputs)
            continue
        lines = iter(" ".join(line.split()) for line in shown.splitlines())
        for expected in block.text.splitlines():
            pattern = re.escape(" ".join(expected.split())).replace("…", ".*")
            assert any(re.fullmatch(pattern, line) for line in lines), f"{expected!r} is not in this output:\n{shown}"


def shell_script(page_blocks: list[Block], api_port: int) -> Iterator[str]:
    """Yield the lines of a shell script that runs the blocks of a page one after another."""
    yield "set -eu; trap 'kill $(jobs -p) 2>/dev/null || true; cat \"$API_LOG\"' EXIT"
    for block in page_blocks:
        text = block.text.replace("127.0.0.1:8080", f"127.0.0.1:{api_port}")
        # The lines of its log could be in the middle of a line of output: show them at the end.
        text = text.replace("services.api &", 'services.api 2>"$API_LOG" &')
        match block.language:
            case "sh":
                yield text
            case "python":
                yield f"python - <<'END_OF_PROGRAM'\n{text}END_OF_PROGRAM"
            case _:
                continue
        if "services.api &" in block.text:
            yield f"until (exec 3<>/dev/tcp/127.0.0.1/{api_port}) 2>/dev/null; do sleep 0.05; done"
        yield f"echo '{END_OF_BLOCK}'"


@pytest.mark.parametrize("page", ["getting-started.md", "forget-a-person.md"])
def test_the_commands_of_a_page_print_what_it_shows(
    page: str, empty_database: Database, sandbox: Sandbox, environ: dict[str, str], tmp_path: Path
) -> None:
    """The database is empty, as in a new sandbox; only the roles may exist already."""
    page_blocks = blocks(page)
    api_port = free_port()
    topic = f"{environ['ORDERS_TOPIC']}-page"
    script, output = tmp_path / "script", tmp_path / "output"
    (tmp_path / "api_log").touch()
    script.write_text("\n".join(shell_script(page_blocks, api_port)), encoding="utf-8")
    settings = {
        **environ,
        **empty_database.environ(),
        "ORDERS_TOPIC": topic,
        "ORDERS_API_BIND": f"127.0.0.1:{api_port}",
        "PATH": f"{Path(sys.executable).parent}:{environ['PATH']}",
        "PYTHONUNBUFFERED": "1",
        "API_LOG": str(tmp_path / "api_log"),
    }
    try:
        with output.open("wb") as stream:
            done = subprocess.run(
                ["bash", script],
                env=settings,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                timeout=90,
                check=False,
            )
    finally:
        admin = AdminClient({"bootstrap.servers": sandbox.kafka.bootstrap_servers})
        admin.delete_topics([topic])[topic].exception(30)
    shown = output.read_text(encoding="utf-8").replace(topic, "orders")
    assert done.returncode == 0, shown
    assert_shown(page_blocks, shown)


def test_the_examples_of_the_library_print_what_the_page_shows(environ: dict[str, str]) -> None:
    page_blocks = blocks("use-the-library.md")
    program = f"\nprint({END_OF_BLOCK!r})\n".join(block.text for block in page_blocks if block.language == "python")
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_shown(page_blocks, done.stdout)


def test_the_example_with_sqlalchemy_stores_both_rows(environ: dict[str, str], database: Database) -> None:
    text = (DOCS / "use-the-library.md").read_text(encoding="utf-8")
    [example] = re.findall(r"^```python sqlalchemy\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    with psycopg.connect(database.superuser_url) as superuser:
        superuser.execute("CREATE TABLE gifts (order_uid text PRIMARY KEY, message text NOT NULL)")
        superuser.execute("GRANT INSERT ON gifts TO orders_writer")
    before = "import os, attrs, orderlib, psycopg, orderlib.testing as t; order = orderlib.decode_order(t.SAMPLE)\n"
    run = subprocess.run(
        [sys.executable, "-c", before + example], env=environ, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    failing = before + example.replace("INSERT INTO gifts VALUES ('gift-3'", "INSERT INTO gifts VALUES (NULL").replace(
        'order_uid="gift-3"', 'order_uid="gift-5"'
    )
    run = subprocess.run([sys.executable, "-c", failing], env=environ, capture_output=True, text=True, check=False)
    assert "NotNullViolation" in run.stderr
    with psycopg.connect(database.superuser_url) as superuser:
        query = "SELECT order_uid, message FROM orders LEFT JOIN gifts USING (order_uid)"
        assert superuser.execute(query).fetchall() == [("gift-3", "Get well soon")]


def test_what_the_page_sends_can_be_read_after_the_wait(environ: dict[str, str], sandbox: Sandbox) -> None:
    """In the shell of the sandbox, ORDERS_TOPIC is not set."""
    [program, shown] = blocks("read-your-own-writes.md")
    without_topic = {name: value for name, value in environ.items() if name != "ORDERS_TOPIC"}
    admin = AdminClient({"bootstrap.servers": sandbox.kafka.bootstrap_servers})
    admin.create_topics([NewTopic("orders", num_partitions=3)])["orders"].result(30)
    try:
        with consuming(without_topic):
            done = subprocess.run(
                [sys.executable, "-c", program.text], env=without_topic, capture_output=True, text=True, check=False
            )
    finally:
        admin.delete_topics(["orders"])["orders"].exception(30)
    assert done.returncode == 0, done.stderr
    assert_shown([program, shown], f"{done.stdout}{END_OF_BLOCK}\n")


def test_test_your_code_shows_the_example_as_it_is() -> None:
    """tests/e2e/test_examples.py runs it."""
    suite = ROOT / "examples" / "pytest_suite"
    sources = [(suite / name).read_text(encoding="utf-8") for name in ("shop.py", "test_shop.py")]
    shown = blocks("test-your-code.md")
    assert len(shown) > 5
    for block in shown:
        assert any(f"\n\n\n{block.text}" in source for source in sources), block.text

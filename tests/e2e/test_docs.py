"""What the documents show is run, and what they list is complete."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
from confluent_kafka.admin import AdminClient

from sandbox import Sandbox
from sandbox.server import free_port
from services import settings as config
from services.admin.__main__ import make_parser
from tests.conftest import Database
from tests.support.programs import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = ROOT / "docs"
SETTINGS = (DOCS / "settings.md").read_text(encoding="utf-8")
PAGES = sorted(DOCS.glob("*.md"))


def test_the_library_in_five_lines_runs_as_shown(environ: dict[str, str]) -> None:
    [block] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", block], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['b563feb7b2b84b6test']\n"


def test_settings_md_lists_exactly_the_settings_that_the_programs_read() -> None:
    sources = [*(ROOT / "services").rglob("*.py")]
    read = {
        name
        for source in sources
        for name in re.findall(r"\bORDERS_[A-Z_]+[A-Z]\b", source.read_text(encoding="utf-8"))
        if not name.startswith("ORDERS_KAFKA_") or name == "ORDERS_KAFKA_BOOTSTRAP_SERVERS"
    }
    listed = set(re.findall(r"^\| `(ORDERS_[A-Z_]+)`", SETTINGS, re.MULTILINE))
    assert listed - {"ORDERS_KAFKA_X_Y"} == read
    assert config.RESERVED_KAFKA_PROPERTIES


@pytest.mark.parametrize("program", ["sender", "consumer", "api", "admin"])
def test_every_program_has_help(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"services.{program}", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stdout.startswith("usage: ")


def test_settings_md_lists_exactly_the_admin_commands() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "services.admin", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    commands = set(re.findall(r"^    ([a-z]+)(?: |$)", done.stdout, re.MULTILINE))
    [line] = [line for line in SETTINGS.splitlines() if "services.admin`" in line]
    assert set(re.findall(r"`([a-z]+)`", line)) == commands


def test_every_make_target_is_explained() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    [phony] = re.findall(r"^\.PHONY: help (.*)$", makefile, re.MULTILINE)
    explained = set(re.findall(r'@echo "make ([a-z-]+)', makefile))
    assert explained == set(phony.split())


@pytest.mark.parametrize(
    "document", [ROOT / "README.md", ROOT / "DESIGN.md", ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda page: page.name
)
def test_every_file_that_a_document_names_is_there(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    named = re.findall(r"`((?:orderlib|services|sandbox|tests|bench|docs|monitoring)/[\w./-]+)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_index_has_every_page() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\(([\w-]+\.md)\)", index)) == {page.name for page in PAGES} - {"README.md"}
    assert "(docs/README.md)" in README


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *PAGES], ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!http)([^)#\s]*)#?([^)\s]*)\)", page.read_text(encoding="utf-8")):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


#: What a reader puts something of their own for, and what we put.
PLACEHOLDERS = {"N": "0", "UID": "someone", "TOPIC/PARTITION/OFFSET": "orders/0/0", "CODE": "too_large"}


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_every_admin_command_is_one(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for found in re.findall(r"(?:services\.admin|--rm admin) ([a-z][^\n`#|&;]*)", text):
        arguments = [PLACEHOLDERS.get(argument, argument) for argument in found.split()]
        assert make_parser().parse_args(arguments).command is not None, found


@attrs.frozen
class Block:
    """A fenced block of a page: ``sh`` and ``python`` are run, ``text`` is what the one before it shows."""

    language: str
    text: str


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page. Commands that no test can run are indented instead."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [Block(*block) for block in found]


# Sybil makes each block a test in this process. That does not fit: the blocks of a page are one shell session with
# servers in the background, they need a topic and a database of their own, and a reader's Python is a new process.

#: Printed after each block, to separate their output.
END_OF_BLOCK = "=== end of block ==="


def assert_shown(of_page: list[Block], output: str) -> None:
    """What each block showed has the lines of the ``text`` after it, in that order; in them, … stands for anything."""
    outputs = iter(output.split(f"{END_OF_BLOCK}\n"))
    shown = ""
    for block in of_page:
        if block.language != "text":
            shown = next(outputs)
            continue
        lines = iter(" ".join(line.split()) for line in shown.splitlines())
        for wanted in block.text.splitlines():
            pattern = re.escape(" ".join(wanted.split())).replace("…", ".*")
            assert any(re.fullmatch(pattern, line) for line in lines), f"{wanted!r} is not shown here:\n{shown}"


def shell_script(of_page: list[Block], api_port: int) -> Iterator[str]:
    """The blocks of a page as a person types them, one after another in one shell."""
    yield "set -eu; trap 'kill $(jobs -p) 2>/dev/null || true' EXIT"
    for block in of_page:
        text = block.text.replace("127.0.0.1:8080", f"127.0.0.1:{api_port}")
        match block.language:
            case "sh":
                yield text
            case "python":
                yield f"python - <<'END_OF_PROGRAM'\n{text}END_OF_PROGRAM"
            case _:
                continue
        if "services.api &" in text:
            yield f"until (exec 3<>/dev/tcp/127.0.0.1/{api_port}) 2>/dev/null; do sleep 0.05; done"
        yield f"echo '{END_OF_BLOCK}'"


@pytest.mark.parametrize("page", ["getting-started.md", "forget-a-person.md"])
def test_a_page_works_as_it_is_typed(
    page: str, empty_database: Database, sandbox: Sandbox, environ: dict[str, str], tmp_path: Path
) -> None:
    """As in a new sandbox, but for the roles, which another test may have made."""
    of_page = blocks(page)
    api_port = free_port()
    topic = f"{environ['ORDERS_TOPIC']}-typed"
    script, output = tmp_path / "script", tmp_path / "output"
    script.write_text("\n".join(shell_script(of_page, api_port)), encoding="utf-8")
    settings = {
        **environ,
        **empty_database.environ(),
        "ORDERS_TOPIC": topic,
        "ORDERS_API_BIND": f"127.0.0.1:{api_port}",
        "PATH": f"{Path(sys.executable).parent}:{environ['PATH']}",
        "PYTHONUNBUFFERED": "1",
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
    assert_shown(of_page, shown)


def test_the_examples_of_the_library_work_one_after_another(environ: dict[str, str]) -> None:
    of_page = blocks("use-the-library.md")
    program = f"\nprint({END_OF_BLOCK!r})\n".join(block.text for block in of_page if block.language == "python")
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_shown(of_page, done.stdout)

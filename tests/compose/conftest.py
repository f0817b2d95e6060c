"""One system for all these tests, because its start takes a minute."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.compose.engine import base_images, find_missing, is_stand_in
from tests.compose.system import System, system


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """The system, healthy."""
    if missing := find_missing():
        pytest.exit(missing, returncode=1)
    with system(tmp_path_factory.mktemp("compose")) as created:
        created.wait_until_up()
        yield created


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Report which images were stand-ins."""
    stand_ins = [image for image in base_images() if is_stand_in(image)]
    if stand_ins:
        terminalreporter.write_line(f"stand-ins were used for {', '.join(stand_ins)}; see tests/compose/README.md")

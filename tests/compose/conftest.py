"""One system for all these tests: to make one takes a minute."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.compose.engine import base_images, is_stand_in, what_is_missing
from tests.compose.system import System, system


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """The system, up and healthy."""
    if missing := what_is_missing():
        pytest.exit(missing, returncode=1)
    with system(tmp_path_factory.mktemp("compose")) as made:
        made.wait_until_up()
        yield made


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which images were not the real ones."""
    stand_ins = [image for image in base_images() if is_stand_in(image)]
    if stand_ins:
        terminalreporter.write_line(f"stand-ins were used for {', '.join(stand_ins)}; see tests/compose/README.md")

"""Run the consumer through thousands of random schedules. ``python -m tests.simulation`` replays one."""

from __future__ import annotations

import random
import re

import pytest

from tests.simulation.invariants import InvariantViolation
from tests.simulation.schedules import explore, table
from tests.simulation.simulator import OCCURRENCES, Simulator
from tests.simulation.store import Bug

#: A planted bug must be found within this number of schedules.
SCHEDULES_FOR_A_BUG = 2_000


def any_seed() -> int:
    """Return another seed in each run. It follows from the seed that pytest-randomly prints at the start."""
    return random.getrandbits(32)


@pytest.mark.parametrize("schedules", [600, pytest.param(10_000, marks=pytest.mark.faults)])
def test_no_schedule_breaks_an_invariant_and_everything_occurs(
    schedules: int, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    seed = any_seed()
    occurrences = explore(seed, schedules)
    with capsys.disabled():
        print(f"\n{schedules:,} schedules from seed {seed} on, and in how many each of these occurred:")
        print(table(occurrences, schedules))
    assert occurrences.keys() == OCCURRENCES
    # Only a failure of metrics writes to the log; all else goes to the simulator.
    assert caplog.records == []
    assert min(occurrences.values()) >= schedules / 200


@pytest.mark.parametrize("bug", Bug, ids=lambda bug: bug.value)
def test_a_planted_bug_is_found(bug: Bug) -> None:
    with pytest.raises(InvariantViolation):
        explore(any_seed(), SCHEDULES_FOR_A_BUG, bug)


def test_a_violation_can_be_replayed() -> None:
    with pytest.raises(InvariantViolation) as found:
        explore(any_seed(), SCHEDULES_FOR_A_BUG, Bug.NO_FENCE)
    replay = re.fullmatch(r"replay: python -m tests\.simulation (\d+) --bug no-fence", found.value.__notes__[0])
    assert replay is not None
    events: list[str] = []
    with pytest.raises(InvariantViolation, match=re.escape(str(found.value))):
        Simulator(int(replay[1]), Bug.NO_FENCE, events.append).run()
    assert events

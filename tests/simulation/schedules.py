"""Run many schedules."""

from __future__ import annotations

from collections import Counter

from tests.simulation.invariants import InvariantViolation
from tests.simulation.simulator import Simulator
from tests.simulation.store import Bug


def explore(first_seed: int, count: int, bug: Bug | None = None) -> Counter[str]:
    """Run ``count`` schedules, and return in how many each of ``OCCURRENCES`` was seen.

    A violation has a note with the command that replays its schedule.
    """
    occurrences: Counter[str] = Counter()
    for seed in range(first_seed, first_seed + count):
        simulator = Simulator(seed, bug)
        try:
            simulator.run()
        except (InvariantViolation, Exception) as exc:
            planted = f" --bug {bug.value}" if bug is not None else ""
            exc.add_note(f"replay: python -m tests.simulation {seed}{planted}")
            raise
        occurrences.update(simulator.occurred)
    return occurrences


def table(occurrences: Counter[str], count: int) -> str:
    """Format the occurrences, the most frequent first."""
    return "\n".join(f"{schedules / count:8.2%}  {name}" for name, schedules in occurrences.most_common())

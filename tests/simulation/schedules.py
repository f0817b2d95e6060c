"""Run many schedules."""

from __future__ import annotations

from collections import Counter

from tests.simulation.invariants import InvariantViolation
from tests.simulation.simulator import Simulator
from tests.simulation.store import Bug


def explore(first_seed: int, count: int, bug: Bug | None = None) -> Counter[str]:
    """Run ``count`` schedules, and return in how many each fault occurred.

    A violation has a note with the command that replays its schedule.
    """
    faults: Counter[str] = Counter()
    for seed in range(first_seed, first_seed + count):
        simulator = Simulator(seed, bug)
        try:
            simulator.run()
        except (InvariantViolation, Exception) as exc:
            planted = f" --bug {bug.value}" if bug is not None else ""
            exc.add_note(f"replay: python -m tests.simulation {seed}{planted}")
            raise
        faults.update(simulator.faults)
    return faults


def table(faults: Counter[str], count: int) -> str:
    """Format the faults, the most frequent first."""
    return "\n".join(f"{occurred / count:8.2%}  {fault}" for fault, occurred in faults.most_common())

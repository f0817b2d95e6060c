"""``python -m tests.simulation SEED``: replay one schedule and print its events. With ``--count``, run many."""

from __future__ import annotations

import argparse
import sys

from tests.simulation.invariants import InvariantViolation
from tests.simulation.schedules import explore, table
from tests.simulation.simulator import Simulator
from tests.simulation.store import Bug


def main(arguments: list[str]) -> int:
    """Run the schedules. Return 0 if no invariant is violated."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description="Replay a schedule.")
    parser.add_argument("seed", type=int)
    parser.add_argument(
        "--count", type=int, help="run this number of schedules, with this seed and the next ones, and print no events"
    )
    parser.add_argument("--bug", type=Bug, help=f"plant a bug: {', '.join(bug.value for bug in Bug)}")
    options = parser.parse_args(arguments)
    try:
        if options.count is None:
            Simulator(options.seed, options.bug, print).run()
        else:
            print(table(explore(options.seed, options.count, options.bug), options.count))
    except InvariantViolation as exc:
        print(f"VIOLATED: {exc}", *getattr(exc, "__notes__", ()), sep="\n")
        return 1
    print("no invariant was violated")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

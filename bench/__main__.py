"""Run every benchmark, one after another, and print the figures as tables. `make bench` runs this.

The benchmarks start the servers they use. `--write` replaces the published figures and their page in docs/bench/.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from bench.page import write_page
from bench.report import add_write_option

#: The benchmarks. ``bench.growth`` takes too long, and ``bench.citus`` needs Citus, so they are not among them.
TOPICS = ("decode", "ingest", "parts", "api", "go")


def main() -> int:
    """Run every benchmark. Return the exit status: 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    add_write_option(parser)
    parser.add_argument(
        "--page", action="store_true", help="measure nothing: write the page again from the published figures"
    )
    arguments = parser.parse_args()
    if arguments.page:
        write_page()
        return 0
    options = ["--write"] if arguments.write else []
    runs = {topic: subprocess.run([sys.executable, "-m", f"bench.{topic}", *options], check=False) for topic in TOPICS}
    failed = [topic for topic, run in runs.items() if run.returncode]
    if arguments.write:
        write_page()
    for topic in failed:
        print(f"bench: {topic} failed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

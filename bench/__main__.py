"""``make bench``: measure every figure, one after the other, on servers that the benchmarks start themselves.

Prints tables. With ``--write`` it replaces the published figures and their page in docs/bench/.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

from bench.report import RESULTS, Figure, add_write_option, plots, table

TOPICS = ("decode", "ingest", "api")

HEAD = """\
# Figures

Made by `python -m bench --write` from the JSON files beside this page; never edited. Each ratio is of one
run, its sides measured in turn.
"""


def main() -> int:
    """Measure everything; exit status 1 if a part failed."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    add_write_option(parser)
    write = parser.parse_args().write
    options = ["--write"] if write else []
    runs = {topic: subprocess.run([sys.executable, "-m", f"bench.{topic}", *options], check=False) for topic in TOPICS}
    failed = [topic for topic, run in runs.items() if run.returncode]
    if write:
        render()
    for topic in failed:
        print(f"bench: {topic} failed", file=sys.stderr)
    return 1 if failed else 0


def render() -> None:
    """Write the tables of what was measured last."""
    parts = [HEAD]
    for topic in TOPICS:
        path = RESULTS / f"{topic}.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text(encoding="utf-8"))
        figures = [
            Figure(**{name: value for name, value in figure.items() if name != "verdict"})
            for figure in result["figures"]
        ]
        machine = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
        drawn = "\n".join(f"![{path.stem}]({path.name})" for path in plots(topic, figures))
        parts.append(f"## {topic}\n\n{machine}\n\n{table(figures)}\n\n{drawn}\n")
    (RESULTS / "README.md").write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

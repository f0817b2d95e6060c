"""Figures with their limits, and the files in docs/bench/ that they are published in."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import sys
from pathlib import Path

import attrs

RESULTS = Path(__file__).parent.parent / "docs" / "bench"


@attrs.frozen
class Figure:
    """One measured number."""

    name: str
    value: float
    unit: str
    #: The lower limit.
    at_least: float | None = attrs.field(default=None, kw_only=True)
    #: The upper limit.
    at_most: float | None = attrs.field(default=None, kw_only=True)
    #: A better value than the limit, which is worth reaching.
    goal: float | None = attrs.field(default=None, kw_only=True)

    @property
    def verdict(self) -> str:
        """``passed``, ``goal reached`` or ``missed``; empty for a figure without a limit."""
        if self.at_least is None and self.at_most is None:
            return ""
        passed = (self.at_least is None or self.value >= self.at_least) and (
            self.at_most is None or self.value <= self.at_most
        )
        if not passed:
            return "missed"
        is_reached = self.goal is not None and (
            self.value >= self.goal if self.at_least is not None else self.value <= self.goal
        )
        return "goal reached" if is_reached else "passed"


def machine() -> dict[str, object]:
    """Describe the machine and the time of the measurement."""
    return {
        "measured_at": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "python": platform.python_version(),
    }


def add_write_option(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--write``. Without it, a run never replaces the published figures."""
    parser.add_argument("--write", action="store_true", help="replace the published figures in docs/bench/")


def publish(topic: str, figures: list[Figure], *, write: bool) -> None:
    """Print the figures as a table; with ``write``, also write them as JSON to ``docs/bench/TOPIC.json``."""
    print(table(figures))
    if not write:
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    entries = [{**attrs.asdict(figure), "verdict": figure.verdict} for figure in figures]
    text = json.dumps({"machine": machine(), "figures": entries}, indent=2, ensure_ascii=False)
    (RESULTS / f"{topic}.json").write_text(text + "\n", encoding="utf-8")


def print_progress(step: str) -> None:
    """Print what a benchmark is doing, to stderr."""
    print(f"bench: {step}", file=sys.stderr, flush=True)


def number(value: float) -> str:
    """Format a value: with commas from 1,000, otherwise with three digits."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def table(figures: list[Figure]) -> str:
    """Format the figures as a Markdown table."""
    lines = ["| figure | measured | limit | result |", "|---|---:|---|---|"]
    for figure in figures:
        limit = ""
        if figure.at_least is not None:
            limit = f"≥ {figure.at_least:g}"
        if figure.at_most is not None:
            limit = f"≤ {figure.at_most:g}"
        if figure.goal is not None:
            limit += f", goal {figure.goal:g}"
        lines.append(f"| {figure.name} | {number(figure.value)} {figure.unit} | {limit} | {figure.verdict} |")
    return "\n".join(lines)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()

"""The published page of figures, and the table in README.md, have the figures of the JSON files."""

from __future__ import annotations

from bench import page
from bench.report import RESULTS


def test_the_page_has_the_published_figures() -> None:
    published = (RESULTS / "README.md").read_text(encoding="utf-8")
    assert published == page.page(page.read_results()), "run python -m bench --page"


def test_the_readme_has_the_published_figures() -> None:
    assert page.readme_table(page.read_results()) in page.README.read_text(encoding="utf-8"), (
        "run python -m bench --page"
    )

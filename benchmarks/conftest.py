"""``pytest benchmarks``: every comparison under pytest-benchmark. ``--quick`` only checks it."""

from __future__ import annotations

import pytest
from harness import Settings


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="tiny sizes: shows that everything runs")


@pytest.fixture(scope="session")
def settings(request: pytest.FixtureRequest) -> Settings:
    """What is measured, with its precision and seed set."""
    quick = request.config.getoption("--quick")
    chosen = Settings(quick=True, rank=8, tokens=6) if quick else Settings()
    chosen.apply()
    return chosen

"""Split the tests into parts of about equal length: `pytest --part 2/6`, `make test-all PART=2/6`.

The split depends on nothing but the names and markers of the tests, so that parts run on different machines are
disjoint and together complete. A file stays whole, because its tests share fixtures; only functions with a limit of
their own (`pytest.mark.timeout`), which run for minutes, are split by case.
"""

import re
from collections.abc import Mapping, Sequence

import pytest

SECONDS = {"unit": 0.03, "theory": 0.5, "distributed": 5.0, "e2e": 6.0, "slurm": 6.0}
"""Estimated seconds of a test by directory. Rough: what matters is that parts take turns at the long files."""
SLOW = 8.0
"""A slow test takes about that many times as long."""
OF_ITS_LIMIT = 0.1
"""The share of its own limit that a test with one is expected to take."""


def parse_part(text: str) -> tuple[int, int]:
    """(part, number of parts) of "2/6"; 1 <= part <= parts. ValueError for anything else."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"{text!r} is no part: 2/6 is the second of six")
    return int(match[1]), int(match[2])


def split(costs: Mapping[str, float], num_parts: int) -> list[set[str]]:
    """Names by part: the costliest first, each to the part that has least so far."""
    parts: list[set[str]] = [set() for _ in range(num_parts)]
    totals = [0.0] * num_parts
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        least = totals.index(min(totals))
        parts[least].add(name)
        totals[least] += costs[name]
    return parts


def unit_of(item: pytest.Item) -> str:
    """What is not split: the file, or the test itself if it has a limit of its own."""
    return item.nodeid if item.get_closest_marker("timeout") else item.nodeid.partition("::")[0]


def cost_of(item: pytest.Item) -> float:
    """Estimated seconds."""
    if limit := item.get_closest_marker("timeout"):
        return OF_ITS_LIMIT * float(limit.args[0])
    directory = item.nodeid.split("/")[1]
    return SECONDS.get(directory, 0.03) * (SLOW if item.get_closest_marker("slow") else 1.0)


def in_part(items: Sequence[pytest.Item], part: int, num_parts: int) -> set[str]:
    """Names of the tests in one of the parts, counted from 1."""
    costs: dict[str, float] = {}
    for item in items:
        costs[unit_of(item)] = costs.get(unit_of(item), 0.0) + cost_of(item)
    units = split(costs, num_parts)[part - 1]
    return {item.nodeid for item in items if unit_of(item) in units}

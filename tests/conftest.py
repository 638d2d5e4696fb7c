"""What holds for all tests: repeatable examples, parts (`--part 2/6`), and what was skipped told at the end.

Property tests draw the same examples at every run, so that a failure is a change's and not the day's. New examples:
`HYPOTHESIS_PROFILE=random pytest ...`. No deadlines: machines are shared, and timings decide no test.
"""

import os
import tempfile
from collections import Counter

import pytest
from hypothesis import settings

from tests.parts import in_part, parse_part

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("random", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", metavar="I/N", help="run one of N parts of about equal length, see tests/parts.py")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist, which has the variable from the first process
        return
    folder = tempfile.TemporaryDirectory(prefix="megatron_rl_tests_", ignore_cleanup_errors=True)
    os.environ["TESTS_SESSION_FOLDER"] = folder.name
    config.add_cleanup(folder.cleanup)


@pytest.hookimpl(tryfirst=True)  # before -m deselects: a part holds the same tests with and without it
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not (text := config.getoption("part")):
        return
    try:
        part, num_parts = parse_part(text)
    except ValueError as error:
        raise pytest.UsageError(f"--part: {error}") from None
    chosen = in_part(items, part, num_parts)
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in chosen])
    items[:] = [item for item in items if item.nodeid in chosen]


@pytest.hookimpl(trylast=True)  # behind the slowest tests
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Every reason for which tests were skipped, with their number and files."""
    counts: Counter[tuple[str, str]] = Counter()
    for report in terminalreporter.getreports("skipped"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        counts[reason.removeprefix("Skipped: "), report.nodeid.partition("::")[0]] += 1
    terminalreporter.section(f"skipped: {counts.total() or 'nothing'}")
    for reason in sorted({reason for reason, _ in counts}):
        files = sorted((file, number) for (of, file), number in counts.items() if of == reason)
        terminalreporter.line(f"{reason}:")
        for file, number in files:
            terminalreporter.line(f"{number:6d} in {file}")

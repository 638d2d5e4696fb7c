"""One cluster for all tests here."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, install, missing, started


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A running cluster. Only slow tests install what is missing; the others are then skipped."""
    if any(item.get_closest_marker("slow") for item in request.session.items if "tests/slurm" in str(item.path)):
        install()
    if (reason := missing()) is not None:
        pytest.skip(reason)
    temporary = tempfile.TemporaryDirectory(prefix="megatron_rl_slurm_", ignore_cleanup_errors=True)
    with temporary as folder, started(Path(folder)) as running:
        yield running

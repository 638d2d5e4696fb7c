"""One cluster for all tests here."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing, started


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running cluster."""
    if (reason := missing()) is not None:
        pytest.skip(reason)
    temporary = tempfile.TemporaryDirectory(prefix="megatron_rl_slurm_", ignore_cleanup_errors=True)
    with temporary as folder, started(Path(folder)) as running:
        yield running

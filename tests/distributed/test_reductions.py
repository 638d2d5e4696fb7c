"""Metrics and counts over three ranks that hold different things."""

import pytest
import torch.distributed as dist

from megatron_rl.algorithms.metrics import Metric
from megatron_rl.parallel.groups import reduce_counts, reduce_metrics
from tests.distributed.spawn import run_ranks


def reduce_everything(rank):
    metrics = {"z/mean": Metric("mean", 10.0**rank, rank + 1.0), "a/max": Metric("max", -float(rank))}
    if rank == 1:
        metrics = {"m/only_rank_1": Metric("min", 7.0), **dict(reversed(metrics.items()))}
    if rank == 2:
        metrics["b/sum"] = Metric("sum", 0.1)
    of_pair = dist.new_group([1, 2])
    with pytest.raises(ValueError, match="ranks gave \\[1, 2, 3\\] counts; must be equally many"):
        reduce_counts([1.0] * (rank + 1), dist.group.WORLD)
    with pytest.raises(ValueError, match="cannot combine"):
        reduce_metrics({"x": Metric("sum" if rank == 0 else "mean", 1.0)}, dist.group.WORLD)
    return {
        "metrics": list(reduce_metrics(metrics, dist.group.WORLD).items()),
        "counts": reduce_counts([2.0**53 if rank == 0 else 0.0, 1.0, 0.1], dist.group.WORLD),
        "pair": None if rank == 0 else reduce_counts([rank], of_pair),
    }


def test_three_ranks():
    first, second, third = run_ranks(reduce_everything, 3)
    # Means: (1 + 10 + 100) / (1 + 2 + 3). A mean of the ranks' means would be (1 + 5 + 33.3) / 3 = 13.1.
    assert first["metrics"] == [("a/max", 0.0), ("b/sum", 0.1), ("m/only_rank_1", 7.0), ("z/mean", 18.5)]
    # 2^53 is held exactly; float32 would also make 3 * 0.1 differ in the 8th digit.
    assert first["counts"] == [2.0**53, 3.0, 0.1 + 0.1 + 0.1]
    assert [of_rank["pair"] for of_rank in (first, second, third)] == [None, [3.0], [3.0]]
    for of_rank in (second, third):
        assert of_rank["metrics"] == first["metrics"]
        assert of_rank["counts"] == first["counts"]

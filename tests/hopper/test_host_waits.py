"""Waits for the device, and operators, of a row's loss and metrics: a budget that cannot grow unseen."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_rl.algorithms.aggregation import GlobalCounts
from megatron_rl.algorithms.metrics import on_host
from megatron_rl.config.schema import AlgorithmConfig
from megatron_rl.data.packing import pack
from megatron_rl.data.samples import TrainingSequence
from megatron_rl.objectives.losses import resolve_policy_loss
from megatron_rl.objectives.objectives import PolicyGradientObjective

_MOST_OPERATORS = 400
"""Of a row, forward. On a GPU each is a launch of some 5 us on the host."""
_WAITING = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
)


class Counted(TorchDispatchMode):
    """Counts operators, and those whose result the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        self.waits += func in _WAITING
        return func(*args, **(kwargs or {}))


def counted(num_rows: int) -> Counted:
    algorithm = AlgorithmConfig()
    sequences = [TrainingSequence(torch.arange(6).numpy(), torch.ones(5).numpy()) for _ in range(2)]
    rows = [pack(sequences, range(2), pad_to_multiple=1) for _ in range(num_rows)]
    objective = PolicyGradientObjective(
        algorithm,
        GlobalCounts(10.0 * num_rows, 2.0 * num_rows),
        8.0,
        policy_loss=resolve_policy_loss(algorithm.policy_loss),
        on_policy=False,
        kl_coefficient=0.0,
    )
    for row in rows:
        for name in ("old_log_probs", "rollout_log_probs", "advantages"):
            row.per_token[name] = torch.full_like(row.loss_mask, -0.5)
    log_probs = [torch.full_like(row.loss_mask, -0.6) for row in rows]
    with Counted() as count:
        found = [objective(one, torch.ones_like(one), row)[1] for one, row in zip(log_probs, rows, strict=True)]
    # One copy of all numbers: operators grow with the metrics, reads do not.
    with Counted() as reading:
        read = on_host(found)
    assert reading.waits == 0
    assert read[0]["policy/loss"].result() == read[-1]["policy/loss"].result()
    return count


def test_finding_20_the_host_waits_for_no_number_of_a_row() -> None:
    one, three = counted(1), counted(3)
    assert (one.waits, three.waits) == (0, 0)
    assert one.operators <= _MOST_OPERATORS

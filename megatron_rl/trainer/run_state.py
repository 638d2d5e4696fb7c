"""Where a run stands, as plain values: equal on all ranks, and saved in its checkpoints."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class RunState:
    """Changed in place: who holds it sees where the run stands now, also after it has gone back."""

    step: int = 0
    """Steps done. The policy's weight version is the same number."""
    data_position: int = 0
    """Training rows drawn."""
    adaptive: dict[str, Any] = field(default_factory=dict)
    """What an algorithm adapts from step to step, as plain values: a KL coefficient, a running baseline."""
    past: dict[str, list[float]] = field(default_factory=dict)
    """Recent values of the metrics that guards watch."""
    rollbacks: int = 0
    """Times that the run has gone back to a checkpoint because of its numbers."""

"""The process groups of one rank, as a value that is passed along."""

from dataclasses import dataclass

from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Groups:
    """Process groups that this rank belongs to, and its place in them.

    Ranks are laid out tensor-parallel fastest, then data-parallel, then pipeline (Megatron's order tp-cp-ep-dp-pp).
    """

    world: ProcessGroup
    """All training ranks."""
    tp: ProcessGroup
    """Ranks that share every layer."""
    pp: ProcessGroup
    """Ranks that share the layers, first stage first."""
    dp: ProcessGroup
    """Ranks with the same part of the model."""

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pp.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the output layer, and so sees log-probs and losses."""
        return self.pp.rank() == self.pp.size() - 1

    @property
    def reports(self) -> bool:
        """Whether this rank's metrics count: one rank of each data-parallel replica, on the last stage."""
        return self.is_last_stage and self.tp.rank() == 0

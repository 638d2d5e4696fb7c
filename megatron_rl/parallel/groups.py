"""The process groups of one rank, as a value that is passed along."""

from dataclasses import dataclass

from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Groups:
    """Process groups that this rank belongs to, and its place in them.

    Ranks are laid out tensor-parallel fastest, then context, then data, then pipeline (Megatron's order
    tp-cp-ep-dp-pp). Experts cut the same ranks of a stage anew: expert-tensor fastest, then expert, then expert-data.

    Which group a sum over the batch needs: context-parallel ranks hold parts of the same rows, and each computes the
    loss of whole rows from log-probs that it gathered. So counts of tokens and sequences are summed over `dp`, and
    gradients, of which each rank has its part's, over `dp_cp`.
    """

    world: ProcessGroup
    """All training ranks."""
    tp: ProcessGroup
    """Ranks that share every layer."""
    pp: ProcessGroup
    """Ranks that share the layers, first stage first."""
    dp: ProcessGroup
    """Ranks with the same part of the model and different rows."""
    cp: ProcessGroup
    """Ranks that share the tokens of the same rows."""
    dp_cp: ProcessGroup
    """Ranks with the same part of the model: over these its gradients are summed."""
    ep: ProcessGroup
    """Ranks that share the experts of a layer."""
    etp: ProcessGroup
    """Ranks that share each expert's matrices."""

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
        return self.is_last_stage and self.tp.rank() == 0 and self.cp.rank() == 0

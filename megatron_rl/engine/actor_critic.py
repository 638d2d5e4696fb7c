"""A policy whose backbone also carries its critic: one pass gives log-probs and values, one optimizer trains both.

The critic is a `ScalarHead` beside the output layer of the last stage. Its parameters are the model's, so that DDP, the
optimizer, pipeline stages and distributed checkpoints hold them as they hold the rest; the tables of the families do
not name them, so that engines and exported checkpoints get the language model alone.
"""

from typing import Any

from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_rl.data.packing import NEW_VALUES
from megatron_rl.engine.policy import Policy
from megatron_rl.models.scalar_head import ScalarHead
from megatron_rl.weights.local_shards import VALUE_HEAD


class ActorCritic(Policy):
    """A policy with a value head, which starts at 0."""

    def _install_head(self) -> None:
        super()._install_head()
        if self.groups.is_last_stage:
            setattr(self.models[-1], VALUE_HEAD, ScalarHead(self.config, bias=True))


class Values:
    """The `Extra` of an `ActorCritic`: a value per token, with its gradient into the backbone."""

    names: tuple[str, ...] = (NEW_VALUES,)

    def __call__(self, gpt: GPTModel, hidden: Tensor) -> Tensor:
        """[1, P] float32; see `Extra`."""
        value_head: Any = getattr(gpt, VALUE_HEAD)
        values: Tensor = value_head(hidden[:, None])[0]
        return values.flatten()[None]

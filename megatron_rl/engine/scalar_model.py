"""Models that give one number per token: reward models and critics, apart from the policy or sharing its backbone.

ScalarModel   a policy in all but its head, so that the optimizer, the passes over micro-batches and the checkpoints
              work on it as they do on a policy. It starts from a language model, whose output layer it leaves out,
              or from a Hugging Face classifier, whose `score` it takes; it is written as a classifier
ActorCritic   a policy whose backbone also carries its critic: one pass gives log-probs and values, one optimizer
              trains both. The critic is a `ScalarHead` beside the output layer of the last stage. Its parameters
              are the model's, so that DDP, the optimizer, pipeline stages and distributed checkpoints hold them;
              the tables of the families do not name them, so that engines and exports get the language model alone
Critic        a `ScalarModel` of its own on the same ranks and micro-batches, with an optimizer of its own. Before
              the first update of a step it values the tokens of all micro-batches; from these values come the
              advantages, the returns that it is fitted to, and the bounds of its clip
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_rl.config.hf_checkpoint import read_json_object
from megatron_rl.config.schema import Config, ModelConfig, ParallelConfig
from megatron_rl.data.packing import NEW_VALUES, MicroBatch
from megatron_rl.engine.head import Extra
from megatron_rl.engine.optimizer import Optimizer
from megatron_rl.engine.policy import Policy
from megatron_rl.engine.step import forward_values
from megatron_rl.models.scalar_head import ScalarHead, backbone_config, is_scalar, scalar_config, scalar_maps
from megatron_rl.parallel.fused_linear_token_loss import TokenLosses
from megatron_rl.parallel.groups import Groups
from megatron_rl.weights.files.hf_reader import HFCheckpointReader
from megatron_rl.weights.files.local_shards import VALUE_HEAD, Place


class ValueHead:
    """Runs a model's last stage, whose output layer is a `ScalarHead`, and gives the values as they are."""

    names = ("values",)
    temperature = 1.0
    extras: Sequence[Extra] = ()
    """Both without meaning here; set alike for every model before a pass."""

    def __call__(self, forward: Callable[[], Tensor], labels: Tensor, token_losses: TokenLosses | None) -> Tensor:
        """[1, P] float32; see `LogProbHead` for the arguments."""
        return forward().flatten()[None]


class ScalarModel(Policy):
    """A backbone with a scalar head, over the training ranks."""

    def __init__(
        self, model: ModelConfig, groups: Groups, parallel: ParallelConfig, *, per_token: bool = False, **settings: Any
    ) -> None:
        """See `Policy`.

        Args:
            per_token: whether it is written as a *ForTokenClassification, whose head has a bias, as critics and
                process reward models are; else as a *ForSequenceClassification, an outcome reward model.
        """
        self.per_token = per_token
        super().__init__(model, groups, parallel, **settings)

    def _model_config(self, hf: dict[str, Any]) -> dict[str, Any]:
        self._source = hf
        return backbone_config(hf)

    def _install_head(self) -> None:
        self.maps = scalar_maps(self.maps, self.config.hidden_size, bias=self.per_token)
        if self.groups.is_last_stage:
            self.models[-1].output_layer = ScalarHead(self.config, bias=self.per_token)
        self.head = ValueHead()
        self.models[-1].compute_language_model_loss = lambda labels, values: values

    def export_config(self) -> dict[str, Any]:
        """The classifier's config.json."""
        return scalar_config(self._source, per_token=self.per_token)

    def load_hf_weights(self, folder: Path) -> None:
        """See `Policy`. Where the folder has no `score`, the head starts at 0."""
        reader = HFCheckpointReader(folder)
        absent = {m.name for m in self.maps if m.name.startswith("output_layer.") and not _has(reader, m.hf_shapes)}
        stored = [m for m in self.maps if m.name not in absent]
        reader.check(stored)
        reader.read_shards(self.parameters, stored, Place.of(self.groups))
        with torch.no_grad():
            for name in absent & self.parameters.keys():
                self.parameters[name].zero_()


def _has(reader: HFCheckpointReader, names: Any) -> bool:
    return all(name in reader.names for name in names)


def is_scalar_checkpoint(folder: Path) -> bool:
    """Whether a Hugging Face folder holds a classifier."""
    return is_scalar(read_json_object(folder / "config.json", "hf_path"))


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


@dataclass(frozen=True)
class Critic:
    """A value function and what trains it."""

    model: ScalarModel
    optimizer: Optimizer

    def add_values(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Give the micro-batches `values`, [T], of the critic as it is now."""
        for micro_batch, values in zip(micro_batches, forward_values(self.model, micro_batches), strict=True):
            micro_batch.per_token["values"] = values


def build_critic(config: Config, groups: Groups, *, num_steps: int) -> Critic:
    """The critic of a run as it starts.

    Args:
        num_steps: optimizer steps of the whole run.
    """
    settings = config.algorithm.critic
    model = ScalarModel(
        replace(config.model, hf_path=settings.hf_path or config.model.hf_path),
        groups,
        config.parallel,
        per_token=True,
        use_distributed_optimizer=settings.optimizer.use_distributed_optimizer,
    )
    return Critic(model, Optimizer(settings.optimizer, model, num_steps=num_steps))

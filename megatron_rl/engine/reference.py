"""The reference policy that a run compares its own with.

ReferenceWeights   of the same model: kept on the host and swapped in when KL needs them. They are those that the
                   run started from, or, where a run says so, follow the policy at a distance
Teacher            of another checkpoint: a policy of its own
reference_logits   its whole distributions, for an exact KL
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from megatron_rl.config.errors import UserError
from megatron_rl.config.schema import Config, KLReference
from megatron_rl.data.packing import MicroBatch
from megatron_rl.device import HAS_CUDA
from megatron_rl.engine.policy import Policy
from megatron_rl.engine.step import forward_hidden
from megatron_rl.parallel.fused_linear_logits_loss import LinearLogits

ReferenceLogits = dict[tuple[int, ...], LinearLogits]
"""By a micro-batch's sequence_ids: the reference's logits of this rank's part of the micro-batch; on the last pipeline
stage only."""


class ReferenceWeights:
    """A host copy of this rank's shards."""

    def __init__(self, policy: Policy, *, is_average: bool = False) -> None:
        """Copy the policy's present weights.

        Args:
            is_average: they are averaged, in float32: in bfloat16 a hundredth of the way would be rounded to none.
        """
        self.policy, self.is_average = policy, is_average
        self.weights = {name: self._copied(p) for name, p in self.parameters().items()}

    def parameters(self) -> dict[str, Tensor]:
        """The policy's, by Megatron's own names: the last stage's copy of a tied embedding is one of them."""
        return {f"{i}.{name}": p for i, gpt in enumerate(self.policy.models) for name, p in gpt.named_parameters()}

    @contextmanager
    @torch.no_grad()
    def swapped_in(self) -> Iterator[Policy]:
        """Inside the context the policy's model computes with the reference's weights; afterwards with its own."""
        # The policy's own stay on its device: engines sleep meanwhile, and the host is a slow way there and back.
        own = {name: p.detach().clone() for name, p in self.parameters().items()}
        self._copy(self.weights)
        try:
            yield self.policy
        finally:
            self._copy(own)

    @torch.no_grad()
    def move(self, decay: float) -> None:
        """Move towards the policy: reference <- decay reference + (1 - decay) policy. 0 copies it."""
        for name, parameter in self.parameters().items():
            present = self._copied(parameter)
            self.weights[name] = torch.lerp(present, self.weights[name], decay) if decay else present

    def _copied(self, parameter: Tensor) -> Tensor:
        dtype = torch.float32 if self.is_average else parameter.dtype
        copied = torch.empty(parameter.shape, dtype=dtype, pin_memory=HAS_CUDA)  # pinned: several times as fast
        return copied.copy_(parameter.detach())

    def _copy(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters().items():
            parameter.data.copy_(weights[name], non_blocking=True)  # ordered with what computes on the device


class Teacher:
    """A reference of another checkpoint, on the same ranks."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    @contextmanager
    def swapped_in(self) -> Iterator[Policy]:
        """A context in which the teacher is what computes."""
        yield self.policy


def reference_logits(
    reference: ReferenceWeights | Teacher, policy: Policy, micro_batches: Sequence[MicroBatch]
) -> ReferenceLogits:
    """The reference's distributions at every token of the micro-batches, for losses of the policy's whole
    distributions.

    Kept are the reference's hidden states, as many bytes as the policy's own, and its output weight.
    """
    groups = policy.groups
    with reference.swapped_in() as model:
        hidden = forward_hidden(model, micro_batches)
        if not groups.is_last_stage:
            return {}
        # The swap ends; a teacher's own weight stays.
        weight = model.head.weight.detach()
        weight = weight.clone() if model is policy else weight
        # Both models' logits are divided by what the policy's head divides by.
        scale = model.head.logit_scale / policy.head.logit_scale
    sequence_parallel = model.config.sequence_parallel
    return {
        micro_batch.sequence_ids: LinearLogits(
            part if scale == 1 else part * scale, weight, groups.tp, sequence_parallel
        )
        for micro_batch, part in zip(micro_batches, hidden, strict=True)
    }


def build_reference(config: Config, policy: Policy) -> ReferenceWeights | Teacher:
    """The reference policy of a run that starts: its own first weights, or another checkpoint.

    Raises:
        UserError: the other checkpoint has another vocabulary.
    """
    path = config.algorithm.kl.reference_path
    if path is None:
        return ReferenceWeights(policy, is_average=config.algorithm.kl.reference is KLReference.moving_average)
    teacher = Policy(
        replace(config.model, hf_path=path, load_weights=True),
        policy.groups,
        config.parallel,
        trained=False,
    )
    sizes = [model.hf["vocab_size"] for model in (teacher, policy)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"algorithm.kl.reference_path: given a vocabulary of {sizes[0]}, allowed: {sizes[1]}, the policy's"
        )
    return Teacher(teacher)


def moving(config: Config, reference: ReferenceWeights | Teacher | None) -> ReferenceWeights | None:
    """The reference policy, if it is part of the run's state: refreshed now and then, or an average."""
    fixed = config.algorithm.kl.reference is KLReference.fixed
    return reference if isinstance(reference, ReferenceWeights) and not fixed else None

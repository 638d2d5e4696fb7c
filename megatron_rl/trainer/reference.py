"""The reference policy that a run compares its own with."""

from dataclasses import replace

from megatron_rl.config.errors import UserError
from megatron_rl.config.schema import Config, KLReference
from megatron_rl.engine.policy import Policy
from megatron_rl.engine.reference import ReferenceWeights, Teacher


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

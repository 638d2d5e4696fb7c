"""Every legal layout of a number of ranks, what one step gives there, and what transformers says it must give.

The reference knows nothing of Megatron, micro-batches or ranks: each sequence goes through transformers' model alone,
on one process, and the same objective is applied to all of them at once. A step at a layout must give its metrics and
every gradient tensor, joined to its full shape under its Hugging Face name.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

import megatron_rl.device  # noqa: F401  (prepares Megatron-Core before any of it is imported)
from megatron_rl.config.schema import (
    Aggregation,
    AlgorithmConfig,
    Dtype,
    KLConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PolicyLossConfig,
)
from megatron_rl.data.packing import unpack
from megatron_rl.data.samples import TrainingSequence
from megatron_rl.engine.initialize import initialize
from megatron_rl.engine.optimizer import Optimizer
from megatron_rl.engine.policy import Policy
from megatron_rl.engine.step import LossFunction, forward_backward
from megatron_rl.objectives.losses import resolve_policy_loss
from megatron_rl.objectives.minibatch import MiniBatch
from megatron_rl.objectives.objectives import PolicyGradientObjective, SupervisedObjective
from megatron_rl.parallel.groups import reduce_metrics
from megatron_rl.weights.files.gather import assemble
from megatron_rl.weights.files.local_shards import Place
from tests.distributed.training_ranks import recorded_rollouts

TEMPERATURE = 0.8
LOSSES = ("sft", "grpo", "ppo")
MICRO_BATCH_TOKENS = (1, 24, 4096)
"""One sequence in a micro-batch, a few, all of a rank's."""


# The contract's bound. float32 rounds at 6e-8, and a gradient sums over 100 tokens and passes 4 layers. Its error is
# measured by the norm of its tensor: single elements may cancel to nothing. Where transformers' own float32 gradients,
# of any loss, are further than half of it from its float64 ones, as with experts, the bound is twice their error.
RELATIVE = 1e-5


@dataclass(frozen=True)
class Case:
    """One step at one layout."""

    layout: dict[str, Any]
    """Fields of ParallelConfig."""
    micro_batch_tokens: int
    loss: str
    model: tuple[tuple[str, Any], ...] = ()
    """Fields of ModelConfig."""

    def __str__(self) -> str:
        short = {"".join(word[0] for word in name.split("_")[:2]): value for name, value in self.layout.items()}
        return f"{short} {self.micro_batch_tokens} {self.loss} {dict(self.model)}"


def layouts(num_ranks: int, *, experts: int = 0, whole_experts: bool = False) -> Iterator[dict[str, Any]]:
    """Every legal factorisation of `num_ranks`, of a model of 4 layers with `experts` routed experts.

    With `whole_experts` the matrices of experts are not split: core splits no expert with a bias. Stages of two chunks
    are for 2 stages only: 4 of them would take 8 layers, which amplify roundings.
    """
    sizes = [size for size in range(1, num_ranks + 1) if num_ranks % size == 0]
    for tp, pp, cp in product(sizes, repeat=3):
        if num_ranks % (tp * pp * cp):
            continue
        # Megatron trains experts under tensor parallelism with sequence parallelism only.
        sequence_parallel = [False] if tp == 1 else [True] if experts else [False, True]
        expert_sizes = [(ep, etp) for ep, etp in product(sizes, repeat=2) if num_ranks // pp % (ep * etp) == 0]
        expert_sizes = [(ep, etp) for ep, etp in expert_sizes if etp == 1 or not whole_experts]
        expert_sizes = [(ep, etp) for ep, etp in expert_sizes if experts and experts % ep == 0] or [(1, None)]
        for sp, chunks, (ep, etp) in product(sequence_parallel, [None, 2] if pp == 2 else [None], expert_sizes):
            yield dict(
                tensor_model_parallel_size=tp,
                pipeline_model_parallel_size=pp,
                context_parallel_size=cp,
                sequence_parallel=sp,
                virtual_pipeline_model_parallel_size=chunks,
                expert_model_parallel_size=ep,
                expert_tensor_parallel_size=etp,
            )


GATHERING = (("transformer_config", {"moe_token_dispatcher_type": "allgather"}),)
"""Megatron's other way of sending tokens to experts, which gathers micro-batches that are filled up to one length."""


def placements(num_ranks: int, **experts: Any) -> Iterator[tuple[dict[str, Any], tuple[tuple[str, Any], ...]]]:
    """(layout, fields of ModelConfig): every layout with each way of sending tokens to experts."""
    yield from product(layouts(num_ranks, **experts), [(), GATHERING] if experts.get("experts") else [()])


def some_cases(num_ranks: int, **experts: Any) -> list[Case]:
    """Every placement once; losses and micro-batches take turns, so that each pair of them is met."""
    pairs = list(product(MICRO_BATCH_TOKENS, LOSSES))
    return [
        Case(layout, *pairs[i * 4 % len(pairs)], model)
        for i, (layout, model) in enumerate(placements(num_ranks, **experts))
    ]


def all_cases(num_ranks: int, **experts: Any) -> list[Case]:
    """Everything with everything."""
    return [
        Case(layout, tokens, loss, model)
        for (layout, model), tokens, loss in product(placements(num_ranks, **experts), MICRO_BATCH_TOKENS, LOSSES)
    ]


def sequences_of(loss: str) -> list[TrainingSequence]:
    """12 sequences of 1 to 17 tokens; 3 for SFT, so that of 4 ranks one has none. PPO's advantages differ by token."""
    sequences = recorded_rollouts()
    if loss == "ppo":
        rng = np.random.default_rng(3)
        for sequence in sequences:
            sequence.per_token["advantages"] = (rng.normal(size=sequence.loss_mask.shape) * sequence.loss_mask).astype(
                np.float32
            )
    return sequences[:3] if loss == "sft" else sequences


def objective_of(loss: str, batch: MiniBatch) -> LossFunction:
    """The objective, with everything switched on that a layout could get wrong."""
    if loss == "sft":
        return SupervisedObjective(AlgorithmConfig(), batch.counts, token_sum_norm=1.0)
    grpo = loss == "grpo"
    algorithm = AlgorithmConfig(
        policy_loss=PolicyLossConfig(clip_low=0.2, clip_high=0.3, dual_clip=3.0),
        kl=KLConfig(coefficient=0.1 if grpo else 0.0),
        entropy_coefficient=0.01 if grpo else 0.0,
        aggregation=Aggregation.sequence_mean_token_mean if grpo else Aggregation.token_mean,
    )
    return PolicyGradientObjective(
        algorithm,
        batch.counts,
        token_sum_norm=1.0,
        policy_loss=resolve_policy_loss(algorithm.policy_loss),
        on_policy=False,
        kl_coefficient=algorithm.kl.coefficient,
    )


Step = tuple[dict[str, float], dict[str, torch.Tensor]]
"""Metrics, and gradients by Hugging Face name."""


def references(folder: Path) -> tuple[dict[str, Step], float]:
    """What each loss must give, from transformers in float64; how far a float32 may be from it, see RELATIVE."""
    exact = {loss: step_of_transformers(folder, loss, torch.float64) for loss in LOSSES}
    rounded = {loss: step_of_transformers(folder, loss, torch.float32)[1] for loss in LOSSES}
    errors = [error(rounded[loss][name], of_loss[name]) for loss, (_, of_loss) in exact.items() for name in of_loss]
    return exact, max(RELATIVE, 2 * max(errors))


def step_of_transformers(folder: Path, loss: str, dtype: torch.dtype) -> Step:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )
    sequences = sequences_of(loss)
    alone: Any = SimpleNamespace(dp=SimpleNamespace(size=lambda: 1, rank=lambda: 0))
    batch = MiniBatch.of(sequences, range(len(sequences)), alone, micro_batch_tokens=4096, pad_to_multiple=1)
    (micro_batch,) = batch.micro_batches
    log_probs, entropies = [], []
    for tokens, labels in zip(
        unpack(micro_batch.tokens, micro_batch), unpack(micro_batch.labels, micro_batch), strict=True
    ):
        distribution = (model(tokens[None]).logits[0] / TEMPERATURE).log_softmax(-1)
        log_probs.append(distribution.gather(1, labels[:, None])[:, 0])
        entropies.append(-(distribution.exp() * distribution).sum(-1))
    value, metrics = objective_of(loss, batch)(torch.cat(log_probs), torch.cat(entropies), micro_batch)
    value.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    gradients = as_stored(model, found)
    norm = float(torch.stack([gradient.norm() for gradient in gradients.values()]).norm())
    return reduce_metrics(metrics, None) | {"optim/grad_norm": norm}, gradients


def as_stored(model: PreTrainedModel, gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients by the names that transformers saves their parameters under, which may differ from the model's own
    names (Mixtral) and keep apart the experts that the model stacks.

    A checkpoint that stacks its experts as well (GPT-OSS) has the number of the expert behind the name here."""
    stored: dict[str, torch.Tensor] = {}
    for name, gradient in revert_weight_conversion(model, gradients).items():
        if re.search(r"\.mlp\.experts\.[a-z]", name):
            stored |= {f"{name}[{expert}]": of_expert for expert, of_expert in enumerate(gradient)}
        else:
            stored[name] = gradient
    return stored


def visit(rank: int, folder: Path, cases: list[Case], expected: Path) -> list[str]:
    """What is wrong at each case, in words; none is what is wanted. Neighbours of one placement share a model."""
    of_losses, bound = torch.load(expected, weights_only=True)
    wrong: list[str] = []
    for (layout, model), of_placement in groupby(cases, key=lambda case: (case.layout, case.model)):
        stepper = Stepper(folder, layout, model)
        for case in of_placement:
            metrics, gradients = stepper.step(case)
            if rank == 0:
                wrong += [f"{case}: {what}" for what in differences(metrics, gradients, *of_losses[case.loss], bound)]
        leave(stepper.policy)
    return wrong


def step_at(folder: Path, case: Case) -> Step:
    """(metrics, gradients by Hugging Face name) of one step at a layout; leaves the world as it was before."""
    stepper = Stepper(folder, case.layout, case.model)
    found = stepper.step(case)
    leave(stepper.policy)
    return found


class Stepper:
    """A model at a layout."""

    def __init__(self, folder: Path, layout: dict[str, Any], model: tuple[tuple[str, Any], ...]) -> None:
        self.parallel = ParallelConfig(**layout)
        groups = initialize(self.parallel, seed=1)
        settings = ModelConfig(hf_path=str(folder), params_dtype=Dtype.float32, **dict(model))
        self.policy = Policy(settings, groups, self.parallel, use_distributed_optimizer=False)
        self.optimizer = Optimizer(OptimizerConfig(use_distributed_optimizer=False), self.policy, num_steps=1)

    def step(self, case: Case) -> Step:
        """(metrics with the norm of the gradients, gradients by Hugging Face name); the weights stay."""
        policy, groups = self.policy, self.policy.groups
        sequences = sequences_of(case.loss)
        batch = MiniBatch.of(
            sequences,
            range(len(sequences)),
            groups,
            micro_batch_tokens=case.micro_batch_tokens,
            pad_to_multiple=1,
            num_micro_batches_multiple=groups.pp.size() if self.parallel.virtual_pipeline_model_parallel_size else 1,
        )
        self.optimizer.zero_grad()
        found = forward_backward(policy, batch.micro_batches, objective_of(case.loss, batch), temperature=TEMPERATURE)
        metrics = reduce_metrics(found, groups.world)
        self.optimizer.megatron.prepare_grads()
        metrics["optim/grad_norm"] = float(self.optimizer.megatron.get_grad_norm())
        return metrics, whole_gradients(policy)


def whole_gradients(policy: Policy) -> dict[str, torch.Tensor]:
    """Every gradient under its Hugging Face name, put together from the shards of all ranks; {} but on rank 0."""
    groups, place = policy.groups, Place.of(policy.groups)
    # As arrays: a tensor travels through a file of its own.
    mine = {name: p.main_grad.numpy() for name, p in policy.parameters.items() if hasattr(p, "main_grad")}
    of_ranks: list[Any] | None = [None] * groups.world.size() if groups.world.rank() == 0 else None
    dist.gather_object((place, mine), of_ranks)
    gradients: dict[str, torch.Tensor] = {}
    for tensor_map in policy.maps if of_ranks else []:
        shards = {
            p.in_group_of(tensor_map)[0]: torch.from_numpy(g[tensor_map.name])
            for p, g in of_ranks or []
            if tensor_map.name in g
        }
        if shards:
            for name, whole in assemble(tensor_map, [shards[i] for i in sorted(shards)]):
                if tensor_map.index is None:
                    gradients[name] = whole.clone()
                else:  # of a stack, in which the others are not filled
                    gradients[f"{name}[{tensor_map.index}]"] = whole[tensor_map.index].clone()
    return gradients


def leave(*policies: Policy) -> None:
    """Forget Megatron's groups and these models, and close the groups' connections."""
    from megatron.core import parallel_state

    for policy in policies:
        for chunk in policy.chunks:
            # The hooks of its parameters hold it through autograd's nodes, where Python sees no circle: each layout's
            # model would stay, with its groups and their threads.
            chunk.__dict__.clear()
    parallel_state.destroy_model_parallel()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def differences(
    metrics: dict[str, float],
    gradients: dict[str, torch.Tensor],
    expected_metrics: dict[str, float],
    expected_gradients: dict[str, torch.Tensor],
    relative: float,
) -> Iterator[str]:
    """Metrics and gradient tensors that are not the reference's, in words."""
    for name, number in expected_metrics.items():
        if name not in metrics or not abs(metrics[name] - number) <= relative * abs(number) + 1e-7:
            yield f"metric {name} is {metrics.get(name)}, must be {number}"
    if missing := expected_gradients.keys() ^ gradients.keys():
        yield f"gradients of one side only: {sorted(missing)}"
    for name in expected_gradients.keys() & gradients.keys():
        off = error(gradients[name], expected_gradients[name])
        if not off <= relative:
            yield f"gradient {name} is off by {off:.2e} of its norm, more than {relative:.2e}"


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """By the norm of the exact tensor."""
    return float((found.double() - exact).norm() / exact.norm().clamp(min=1e-12))

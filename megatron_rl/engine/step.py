"""Passes over micro-batches with Megatron's schedules: forward and backward, and forward alone.

The loss contract: `loss_fn` returns a loss that is already divided by counts over the global batch, so gradients are
plain sums over micro-batches and ranks. Core is told so by `calculate_per_token_loss` and a token count that it never
divides by. Context-parallel ranks each compute the loss of whole micro-batches, from log-probs gathered over them;
backward, each takes the gradient of its own tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_rl.algorithms.metrics import Metric, combine, on_host
from megatron_rl.data.packing import MicroBatch
from megatron_rl.device import this_device
from megatron_rl.engine.head import Extra, TokenLoss
from megatron_rl.engine.micro_batch_part import MicroBatchPart, parts_of_micro_batches
from megatron_rl.engine.policy import Policy
from megatron_rl.engine.routing import padding_mask, scale_auxiliary_losses
from megatron_rl.parallel.fused_linear_logits_loss import OfLogits
from megatron_rl.parallel.fused_linear_token_loss import TokenLosses

NON_FINITE_LOSSES = "optim/non_finite_losses"
"""Metric: micro-batches whose loss was nan or infinite."""

LossFunction = Callable[..., tuple[Tensor, dict[str, Metric]]]
"""(log_probs [T], entropy [T], micro-batch) -> (loss, metrics) for a policy; (values [T], micro-batch) for a scalar
model. What the extras of the pass gave is in `micro_batch.per_token`, with its gradient.

An objective may have a method `token_losses(micro_batch)`. It returns the micro-batch's loss token by token, a function
of log-probs [n], entropy [n] and the indices of these tokens in the micro-batch, whose values [n] add up to the loss;
or `OfLogits`, a function of whole distributions, whose further values the objective then finds in
`micro_batch.per_token`; or None, if the loss of a token depends on others. The gradient is then formed in the forward
pass (`parallel.fused_linear_token_loss`), which saves a quarter of the head's work, and the objective itself is called
for its metrics, without gradient. The method counts only in the class that defines it: a subclass is another loss.
"""


def _token_losses(loss_fn: LossFunction | None, part: MicroBatchPart) -> TokenLosses | OfLogits | None:
    """The objective's losses by slots of the part, if it says them token by token."""
    if loss_fn is None or "token_losses" not in vars(type(loss_fn)):
        return None
    of_micro_batch: TokenLosses | OfLogits | None = loss_fn.token_losses(part.micro_batch)  # type: ignore[attr-defined]
    return None if of_micro_batch is None else part.by_slots(of_micro_batch)


def _forward_step(
    parts: Iterator[MicroBatchPart], model: Any, *, policy: Policy, loss_fn: LossFunction | None, hidden: bool
) -> Any:
    part, chunk = next(parts), policy.chunks.index(model)
    policy.routing.before(chunk, part)
    plain = getattr(model, "module", model)
    forward = partial(
        model,
        input_ids=part.tokens[None],
        position_ids=part.position_ids[None],
        attention_mask=None,
        labels=part.labels[None],
        packed_seq_params=part.packed_seq_params,
        padding_mask=padding_mask(policy.config, policy.groups, part, first_chunk=plain.pre_process),
    )
    if plain.post_process and hidden:
        output = policy.head.hidden_states(forward)
    elif plain.post_process:
        output = policy.head(forward, part.labels, _token_losses(loss_fn, part))
    else:
        output = forward()
    policy.routing.after(chunk, part)

    def loss(output: Tensor | TokenLoss, non_loss_data: bool = False) -> Any:
        if hidden:
            return output
        outputs = output.outputs if isinstance(output, TokenLoss) else output
        whole, micro_batch = tuple(part.joined(one, policy.groups) for one in outputs), part.micro_batch
        if non_loss_data:
            return whole
        assert loss_fn is not None
        num_arguments = len(policy.head.names)
        further = dict(zip(_extra_names(policy), whole[num_arguments:], strict=True))
        if isinstance(output, TokenLoss):
            further = {name: part.joined(value, policy.groups) for name, value in output.values.items()}
        micro_batch = replace(micro_batch, per_token=micro_batch.per_token | further)
        with torch.set_grad_enabled(not isinstance(output, TokenLoss)):
            value, metrics = loss_fn(*whole[:num_arguments], micro_batch)
        # A token that is not finite has gradient 0 in some objectives, so the loss itself must be looked at.
        metrics = metrics | {NON_FINITE_LOSSES: Metric("sum", (~torch.isfinite(value.detach())).sum())}
        # A count of 0 tokens: core adds the counts up and divides by none.
        return output.loss if isinstance(output, TokenLoss) else value, torch.tensor(0, dtype=torch.int32), metrics

    return output, loss


def _extra_names(policy: Policy) -> list[str]:
    return [name for extra in policy.head.extras for name in extra.names]


def _finalize(model: list[Any], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
    finalize_model_grads(model, None, **kwargs)


def _run(
    policy: Policy,
    micro_batches: Sequence[MicroBatch],
    loss_fn: LossFunction | None,
    *,
    forward_only: bool,
    hidden: bool = False,
) -> list[Any]:
    policy.config.finalize_model_grads_func = _finalize
    # This way of sending tokens to experts gathers them all, in equal parts.
    equal = bool(policy.config.num_moe_experts) and policy.config.moe_token_dispatcher_type == "allgather"
    parts = parts_of_micro_batches(micro_batches, policy.groups, multiple=policy.token_multiple, equal=equal)
    if not forward_only:
        scale_auxiliary_losses(policy.config, policy.groups, sum(part.num_tokens for part in parts))
    return get_forward_backward_func()(
        forward_step_func=partial(_forward_step, policy=policy, loss_fn=loss_fn, hidden=hidden),
        data_iterator=[iter(parts) for _ in policy.chunks] if len(policy.chunks) > 1 else iter(parts),
        model=policy.chunks,
        num_microbatches=len(parts),
        # With variable_seq_lengths pipeline stages tell each other the true length of each micro-batch.
        seq_length=max(len(part.tokens) for part in parts),
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


def forward_backward(
    policy: Policy,
    micro_batches: Sequence[MicroBatch],
    loss_fn: LossFunction,
    *,
    temperature: float = 1.0,
    extras: Sequence[Extra] = (),
) -> dict[str, Metric]:
    """Accumulate the gradients of sum over micro-batches and ranks of `loss_fn`, reduced over all ranks.

    Args:
        micro_batches: this data-parallel rank's micro-batches; every rank has the same number of them, at least one.
            With virtual pipeline stages a multiple of the number of stages.
        loss_fn: see LossFunction; called on the last pipeline stage.
        temperature: divides the logits.
        extras: what else `loss_fn` wants; it then has no `token_losses`.

    Returns:
        The micro-batches' metrics combined, on ranks with `groups.reports`; elsewhere {}.
    """
    policy.head.temperature, policy.head.extras = temperature, extras
    metrics: dict[str, Metric] = {}
    for of_micro_batch in on_host(_run(policy, micro_batches, loss_fn, forward_only=False)):
        metrics = combine(metrics, of_micro_batch)
    return metrics if policy.groups.reports else {}


@torch.no_grad()
def forward_log_probs(
    policy: Policy, micro_batches: Sequence[MicroBatch], *, temperature: float = 1.0
) -> list[tuple[Tensor, Tensor]]:
    """Log-probs and entropy of every token, without gradient.

    Returns:
        For each micro-batch (log_probs [T], entropy [T]), float32, nats, on the CPU, on every rank of the replica.
    """
    outputs = forward_outputs(policy, micro_batches, temperature=temperature)
    return [(of_micro_batch["log_probs"], of_micro_batch["entropy"]) for of_micro_batch in outputs]


@torch.no_grad()
def forward_hidden(policy: Policy, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
    """Hidden states of every token, without gradient: what a later pass makes this policy's logits of.

    Returns:
        On the last pipeline stage, for each micro-batch [P, H] of this rank's part of it (under sequence parallelism
        [P/tp, H]), on the device; elsewhere [].
    """
    return _run(policy, micro_batches, None, forward_only=True, hidden=True)


@torch.no_grad()
def forward_values(model: Policy, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
    """Values of every token under a `ScalarModel`, without gradient.

    Returns:
        For each micro-batch [T], float32, on the CPU, on every rank of the replica.
    """
    return [of_micro_batch["values"] for of_micro_batch in forward_outputs(model, micro_batches)]


@torch.no_grad()
def forward_outputs(
    policy: Policy, micro_batches: Sequence[MicroBatch], *, temperature: float = 1.0, extras: Sequence[Extra] = ()
) -> list[dict[str, Tensor]]:
    """What the head and the extras give for each micro-batch by name, without gradient.

    Returns:
        For each micro-batch tensors [T], float32, on the CPU, on every rank of the replica.
    """
    policy.head.temperature, policy.head.extras = temperature, extras
    names = [*policy.head.names, *_extra_names(policy)]
    num_outputs = len(names)
    outputs = _run(policy, micro_batches, None, forward_only=True)
    groups = policy.groups
    if groups.pp.size() > 1:
        lengths = [len(micro_batch.tokens) for micro_batch in micro_batches]
        flat = torch.empty(num_outputs, sum(lengths), dtype=torch.float32, device=this_device())
        if groups.is_last_stage:
            flat = torch.stack([torch.cat([o[i] for o in outputs]) for i in range(num_outputs)])
        dist.broadcast(flat, src=dist.get_global_rank(groups.pp, groups.pp.size() - 1), group=groups.pp)
        outputs = list(zip(*(part.split(lengths) for part in flat), strict=True))
    return [
        {name: output.cpu() for name, output in zip(names, of_micro_batch, strict=True)} for of_micro_batch in outputs
    ]

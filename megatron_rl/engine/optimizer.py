"""Megatron's (distributed) AdamW with its schedule, and the memory that training gives up while engines generate.

Gradient buffers hold nothing between steps, so they are given up and come back as zeros. The optimizer's state goes to
the host and back; on a CPU it is there already. Parameters stay: they are what engines are sent, and what log-probs are
computed with.
"""

import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_rl.config.schema import AdamImplementation, LRDecayStyle, OptimizerConfig
from megatron_rl.device import HAS_CUDA
from megatron_rl.engine.policy import Policy


class ExponentialScheduler(OptimizerParamScheduler):
    """Core's scheduler with the one decay style that it lacks.

    lr_t = max_lr (min_lr / max_lr)^(t / T), t and T counted after warm-up.
    """

    def get_lr(self, param_group: dict) -> float:
        """Learning rate after `num_steps` steps."""
        decayed = self.num_steps - self.lr_warmup_steps
        if decayed <= 0:
            return float(super().get_lr(param_group))
        max_lr, min_lr = (float(param_group.get(name, getattr(self, name))) for name in ("max_lr", "min_lr"))
        progress = min(1.0, decayed / (self.lr_decay_steps - self.lr_warmup_steps))
        return float(max_lr * (min_lr / max_lr) ** progress)


@dataclass(frozen=True)
class Update:
    """What one optimizer step did."""

    grad_norm: float
    """Global L2 norm before clipping."""
    lr: float
    """Learning rate that it used."""
    finite: bool
    """False: the loss or the norm was not finite, and nothing was changed."""
    made: bool = True
    """False: nothing was changed."""


def _take(implementation: AdamImplementation) -> None:
    """Make core use this Adam. Core decides by what it can import, once, in names of its modules."""
    outer: Any = importlib.import_module("megatron.core.optimizer")
    distributed: Any = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    if implementation is AdamImplementation.torch:
        outer.Adam, distributed.Adam = torch.optim.AdamW, torch.optim.Adam
    else:
        library = "apex" if implementation is AdamImplementation.apex else "transformer_engine.pytorch"
        outer.Adam = distributed.Adam = importlib.import_module(f"{library}.optimizers").FusedAdam
    outer.USING_PYTORCH_OPTIMIZER = implementation is AdamImplementation.torch
    distributed.HAVE_APEX_OR_TE = implementation is not AdamImplementation.torch
    distributed.USING_TE_OPTIMIZER = implementation is AdamImplementation.transformer_engine
    distributed.USING_APEX_OPTIMIZER = implementation is AdamImplementation.apex


def build_schedule(config: OptimizerConfig, optimizer: Any, *, num_steps: int) -> OptimizerParamScheduler:
    """What sets learning rate and weight decay in the `param_groups` of an optimizer, step by step.

    Args:
        num_steps: optimizer steps of the whole run.
    """
    exponential = config.lr_decay_style is LRDecayStyle.exponential
    decay_steps = config.lr_decay_steps or num_steps
    stays = config.end_weight_decay is None
    return (ExponentialScheduler if exponential else OptimizerParamScheduler)(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.lr_warmup_steps,
        lr_decay_steps=max(decay_steps, config.lr_warmup_steps + 1),
        lr_decay_style=config.lr_decay_style.value,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay if stays else config.end_weight_decay,
        wd_incr_steps=decay_steps,
        wd_incr_style="constant" if stays else config.weight_decay_incr_style.value,
        # On resume the schedule is the configuration's; only how far it has come is the checkpoint's.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


class Optimizer:
    """Steps the policy's parameters."""

    def __init__(self, config: OptimizerConfig, policy: Policy, *, num_steps: int) -> None:
        """Args:
        config: the user's.
        policy: with its weights loaded; the optimizer takes its float32 copies from them.
        num_steps: optimizer steps of the whole run, for the schedule.
        """
        self.policy = policy
        _take(policy.choices.optimizer)
        bf16 = policy.dtype is torch.bfloat16
        self.megatron = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=config.lr,
                min_lr=config.min_lr,
                weight_decay=config.weight_decay,
                adam_beta1=config.adam_beta1,
                adam_beta2=config.adam_beta2,
                adam_eps=config.adam_eps,
                clip_grad=config.clip_grad,
                bf16=bf16,
                params_dtype=policy.dtype,
                use_distributed_optimizer=config.use_distributed_optimizer,
                fp8_recipe=policy.config.fp8_recipe if policy.config.fp8 else None,
            ),
            policy.chunks,
        )
        self.scheduler = build_schedule(config, self.megatron, num_steps=num_steps)

    def resume_schedule(self, state: dict[str, Any]) -> None:
        """Go on with the configuration's schedule from where a checkpoint's stood; after the optimizer's state."""
        for group in self.megatron.param_groups:
            bounds = {"max_lr": self.scheduler.max_lr, "min_lr": self.scheduler.min_lr}
            group.update({name: value for name, value in bounds.items() if name in group})
        self.scheduler.load_state_dict(state)

    def zero_grad(self) -> None:
        """Forget the gradients of the last step."""
        for chunk in self.policy.chunks:
            chunk.zero_grad_buffer()
        self.megatron.zero_grad()

    def step(self, *, loss_is_finite: bool = True, accepts: Callable[[float], bool] | None = None) -> Update:
        """Apply the accumulated gradients once, clipped, and advance the schedule.

        Args:
            loss_is_finite: equal on all ranks; False skips the update, as a gradient norm does that is not finite.
            accepts: asked with the gradient norm, on all ranks; False skips the update.
        """
        lr = max(group["lr"] for group in self.megatron.param_groups) if self.megatron.param_groups else 0.0
        self.megatron.prepare_grads()
        # The norm is a sum over all ranks, so they agree on whether it is finite.
        grad_norm = float(self.megatron.get_grad_norm())
        if not (loss_is_finite and math.isfinite(grad_norm)):
            return Update(grad_norm, lr, finite=False, made=False)
        if accepts is not None and not accepts(grad_norm):
            return Update(grad_norm, self._over_ranks(lr), finite=True, made=False)
        self.megatron.step()
        self.scheduler.step(increment=1)
        return Update(grad_norm, self._over_ranks(lr), finite=True)

    def _over_ranks(self, lr: float) -> float:
        # A rank whose shard of the optimizer is empty has no parameter group to read the rate from.
        if dist.get_world_size() == 1:
            return lr
        value = torch.tensor([lr], dtype=torch.float64)  # on the host: NCCL would connect all ranks for it
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return float(value)


class TrainingMemory:
    """What one model takes for its training, beside its parameters."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._chunks: list[Any] = list(optimizer.policy.chunks)
        self._optimizer: Any = optimizer.megatron
        self._is_free = False

    def free(self) -> None:
        """Give the memory up, until `take_back`. Between steps, when gradients are of no use any more."""
        if self._is_free:
            return
        for chunk in self._chunks:
            chunk.offload_grad_buffers(synchronize=HAS_CUDA, empty_cache=HAS_CUDA)
        for state, _ in self._states():
            for name, tensor in _large(state):
                state[name] = tensor.cpu()
        self._is_free = True

    def take_back(self) -> None:
        """Take it again, before a step: gradients are zero, the optimizer's state what it was."""
        if not self._is_free:
            return
        for chunk in self._chunks:
            chunk.restore_grad_buffers(synchronize=HAS_CUDA)
        for state, parameter in self._states():
            for name, tensor in _large(state):
                state[name] = tensor.to(parameter.device)
        self._is_free = False

    def _states(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for part in getattr(self._optimizer, "chained_optimizers", [self._optimizer]):
            torch_optimizer = getattr(part, "optimizer", None)
            if torch_optimizer is not None:
                yield from ((state, parameter) for parameter, state in torch_optimizer.state.items())


def _large(state: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """Moments, and not the scalars that Adam keeps where it likes."""
    return [(name, value) for name, value in state.items() if isinstance(value, Tensor) and value.dim() > 0]

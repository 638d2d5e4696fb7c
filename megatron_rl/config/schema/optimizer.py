"""The optimizer and its schedule."""

from dataclasses import dataclass
from enum import Enum


class LRDecayStyle(Enum):
    """Shape of the learning rate after warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    exponential = "exponential"


class WeightDecayStyle(Enum):
    """Shape of the weight decay's way to its end."""

    linear = "linear"
    cosine = "cosine"


class AdamImplementation(Enum):
    """Whose Adam steps the parameters."""

    auto = "auto"
    transformer_engine = "transformer_engine"
    apex = "apex"
    torch = "torch"


class NonFinite(Enum):
    """What to do when the loss or the gradient norm is not finite."""

    stop = "stop"
    skip = "skip"
    rollback = "rollback"


@dataclass
class OptimizerConfig:
    """AdamW through Megatron's (distributed) optimizer, and its schedule."""

    lr: float = 1e-6
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: LRDecayStyle = LRDecayStyle.constant
    """Shape of the learning rate after warm-up."""
    lr_warmup_steps: int = 0
    """Optimizer steps of linear warm-up from 0."""
    lr_decay_steps: int | None = None
    """Optimizer steps until min_lr; null: the whole run."""
    weight_decay: float = 0.0
    """Decoupled weight decay; biases and norms have none."""
    end_weight_decay: float | None = None
    """Weight decay at the end of the decay; null: it stays."""
    weight_decay_incr_style: WeightDecayStyle = WeightDecayStyle.cosine
    """With end_weight_decay: how it goes there."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.95
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_grad: float = 1.0
    """Global gradient norm is clipped to this; 0 turns clipping off."""
    implementation: AdamImplementation = AdamImplementation.auto
    """auto takes a fused one on a GPU where it is installed: Transformer Engine's, else apex's."""
    use_distributed_optimizer: bool = True
    """Shard the optimizer's state over the data-parallel ranks."""
    on_non_finite: NonFinite = NonFinite.stop
    """When the loss or the gradient norm is not finite: stop the run, skip the update and count it, or go back to the
    last checkpoint and on with the data that follow."""

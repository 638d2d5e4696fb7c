"""The objective: independent choices, of which a named algorithm is a preset."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from megatron_rl.config.schema.optimizer import OptimizerConfig


class Aggregation(Enum):
    """How per-token losses become one number; see `algorithms/aggregation.py`."""

    token_mean = "token_mean"
    sequence_mean_token_mean = "sequence_mean_token_mean"
    sequence_mean_token_sum = "sequence_mean_token_sum"
    token_sum_norm = "token_sum_norm"


class KLEstimator(Enum):
    """Estimators of KL(policy || reference) from samples of the policy, or the exact one; see `algorithms/kl.py`."""

    k1 = "k1"
    k2 = "k2"
    k3 = "k3"
    exact = "exact"


class Divergence(Enum):
    """Of two distributions over the vocabulary; see `algorithms/supervised_loss.py`."""

    reverse = "reverse"
    forward = "forward"
    jensen_shannon = "jensen_shannon"


class KLPlace(Enum):
    """Where the KL penalty enters: added to the loss, or subtracted from the reward."""

    loss = "loss"
    reward = "reward"


class KLReference(Enum):
    """The policy that the KL penalty holds on to."""

    fixed = "fixed"
    refreshed = "refreshed"
    moving_average = "moving_average"


class Whitening(Enum):
    """Advantages in units of their standard deviation over the tokens of the global batch; see `advantages.whiten`."""

    none = "none"
    scale = "scale"
    full = "full"


class CorrectionLevel(Enum):
    """What the ratio of training to rollout policy is taken over; see `algorithms/importance.py`."""

    token = "token"
    sequence = "sequence"
    geometric = "geometric"


class CorrectionMethod(Enum):
    """What is done with the ratio of training to rollout policy; see `algorithms/importance.py`."""

    metrics_only = "metrics_only"
    truncate = "truncate"
    mask = "mask"
    reject = "reject"


@dataclass
class AdvantageConfig:
    """From rewards to advantages. An estimator takes those of these settings that its parameters name."""

    estimator: str = "group_relative"
    """A name of `objectives/advantages.py`, or a dotted path 'package.module:function'."""
    normalize_by_std: bool = True
    """group_relative: GRPO divides by the group's standard deviation; Dr.GRPO does not."""
    std_correction: int = 1
    """group_relative: 1, Bessel's correction of the group's standard deviation, as torch.std; 0, the population's."""
    std_epsilon: float = 1e-6
    """Added to a standard deviation that is divided by."""
    gamma: float = 1.0
    """monte_carlo, td0, gae: discount per trained token."""
    lam: float = 0.95
    """gae: lambda."""
    baseline_decay: float = 0.9
    """running_baseline: what of the old mean stays after a step."""
    whiten: Whitening = Whitening.none
    """Afterwards divide by the standard deviation over the global batch's tokens; full: also subtract the mean."""
    args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of a function of your own."""


@dataclass
class PolicyLossConfig:
    """The loss of the policy. It takes those of these settings that its parameters name."""

    name: str = "ppo_clip"
    """A name of `objectives/losses.py`, or a dotted path 'package.module:function'."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    dual_clip: float | None = None
    """For negative advantages the loss is bounded by dual_clip * |advantage|; > 1. null: no bound."""
    args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of a function of your own."""


@dataclass
class CorrectionConfig:
    """What is done about the difference between the engine that sampled and the policy that trains."""

    method: CorrectionMethod = CorrectionMethod.metrics_only
    """metrics_only reports the ratios; the others weigh the tokens of the loss."""
    level: CorrectionLevel = CorrectionLevel.token
    """What the ratio is taken over."""
    low: float = 0.5
    """Lower bound of the ratio itself; truncate does not use it."""
    high: float = 2.0
    """Upper bound of the ratio itself."""


@dataclass
class KLConfig:
    """Penalty for leaving the reference policy."""

    coefficient: float = 0.0
    """0: no reference policy is kept. With a target: where the coefficient starts. Of the recipes rl and sft."""
    estimator: KLEstimator = KLEstimator.k3
    """Estimator of the KL from samples. exact: of the whole distributions at each position, in the loss; the one that
    recipe sft takes, whose tokens are no samples of the policy."""
    direction: Divergence = Divergence.reverse
    """With estimator exact: KL(policy || reference), KL(reference || policy) (forward), or what is between them."""
    mixture: float = 0.5
    """With direction jensen_shannon: the reference's part of the mixture, in (0, 1)."""
    place: KLPlace = KLPlace.loss
    """In the loss, or in the reward: of each token for an estimator over tokens, else summed over the completion."""
    weighted: bool = False
    """In the loss: times the importance weight, with which k1 and k3 are right in their gradient too."""
    target: float | None = None
    """KL per token, nats, that the coefficient is adapted to; null: it stays."""
    horizon: int = 10000
    """With a target: samples over which the coefficient changes by e^0.2 at most."""
    reference: KLReference = KLReference.fixed
    """fixed: the model the run started from. refreshed: the policy of refresh_interval steps ago or less.
    moving_average: of the policies after each step."""
    refresh_interval: int = 100
    """With reference refreshed: steps between copies of the policy."""
    moving_average_decay: float = 0.99
    """With reference moving_average: what of the old average stays after a step."""
    reference_path: str | None = None
    """Another Hugging Face checkpoint as the reference: the teacher of a distillation. Same tokens as the policy's."""


@dataclass
class CriticConfig:
    """The value function, of a run whose advantage estimator names `values`, or that shares its backbone with one."""

    shared: bool = False
    """A value head on the policy's backbone, trained with the policy by its optimizer; false: a model of its own."""
    coefficient: float = 0.5
    """With shared: weight of the value loss in the policy's."""
    hf_path: str | None = None
    """Checkpoint that it starts from, a language model or a reward model; null: model.hf_path."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5))
    """Its own optimizer."""
    warmup_steps: int = 0
    """First rollout steps in which the critic alone is trained."""
    clip: float | None = None
    """Values may move this far from those before the step's first update, in units of reward; null: any way."""


@dataclass
class DynamicSamplingConfig:
    """DAPO's refilling of the batch where all completions of a prompt have the same reward, and so no advantage."""

    max_rounds: int = 1
    """Generations of a step at most; 1: no refilling. After the last round the batch is filled with the rest."""
    reward: str | None = None
    """The reward in which completions must differ; null: evaluation.correct_reward, or the first of the rewards."""


@dataclass
class PreferenceConfig:
    """The loss of the recipes preference and reward_model; it takes the settings that it names."""

    loss: str = "dpo"
    """A name of `objectives/losses.py`, or a dotted path 'package.module:function'."""
    beta: float = 0.1
    """Inverse temperature of the implicit reward."""
    label_smoothing: float = 0.0
    """Part of the pairs that are taken to be labelled the wrong way round."""
    length_normalized: bool = False
    """dpo, ipo: of log-probs averaged over a completion's tokens, not summed."""
    sft_coefficient: float = 0.0
    """Weight of the mean negative log-likelihood of the chosen completions."""
    args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the loss."""


@dataclass
class SupervisedConfig:
    """The loss of the recipe sft."""

    loss: str = "sft"
    """A name of `objectives/losses.py`, or a dotted path 'package.module:function'."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the loss."""
    coefficient: float = 1.0
    """Weight of this loss; 0 leaves the divergence of algorithm.kl alone, as in distillation."""


@dataclass
class AlgorithmConfig:
    """The objective: independent choices, of which named algorithms are presets (configs/algorithms)."""

    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    """From rewards to advantages."""
    policy_loss: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    """The loss of the policy."""
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    """The difference between the engine that sampled and the policy that trains."""
    kl: KLConfig = field(default_factory=KLConfig)
    """Penalty for leaving the reference policy."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """The value function."""
    dynamic_sampling: DynamicSamplingConfig = field(default_factory=DynamicSamplingConfig)
    """Refilling of the batch."""
    supervised: SupervisedConfig = field(default_factory=SupervisedConfig)
    """The loss of supervised fine-tuning."""
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    """The loss on preferences."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus."""
    aggregation: Aggregation = Aggregation.token_mean
    """How per-token losses become one number."""
    token_sum_norm: float | None = None
    """Tokens per sequence that 'token_sum_norm' divides by; null: sampling.max_response_tokens."""

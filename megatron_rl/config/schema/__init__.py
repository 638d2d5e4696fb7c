"""The typed schema of a run's configuration: one dataclass per owner, a docstring under every field.

A field's type and default are declared here and nowhere else; what a combination of fields may not be is said in
`validate.py`. Megatron's arguments keep Megatron's names. Batch sizes say what they count.
"""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from megatron_rl.config.schema.algorithm import (
    AdvantageConfig,
    Aggregation,
    AlgorithmConfig,
    CorrectionConfig,
    CorrectionLevel,
    CorrectionMethod,
    CriticConfig,
    Divergence,
    DynamicSamplingConfig,
    KLConfig,
    KLEstimator,
    KLPlace,
    KLReference,
    PolicyLossConfig,
    PreferenceConfig,
    SupervisedConfig,
    Whitening,
)
from megatron_rl.config.schema.data import DataConfig
from megatron_rl.config.schema.model import (
    Dtype,
    Fp8Format,
    Fp8Recipe,
    LayerSpec,
    ModelConfig,
    ParallelConfig,
    QuantizedFormat,
)
from megatron_rl.config.schema.optimizer import (
    AdamImplementation,
    LRDecayStyle,
    NonFinite,
    OptimizerConfig,
    WeightDecayStyle,
)
from megatron_rl.config.schema.rewards import (
    OverlongConfig,
    RewardEngine,
    RewardFunctionConfig,
    RewardModelConfig,
    RewardModelKind,
    RewardScale,
    RewardsConfig,
    StepCredit,
)
from megatron_rl.config.schema.rollout import (
    EnginePlacement,
    InFlight,
    RolloutConfig,
    SamplingConfig,
    SyncConfig,
    SyncTransport,
    SyncVerify,
)
from megatron_rl.config.schema.run import (
    CheckpointConfig,
    ConvergenceConfig,
    EvaluationConfig,
    GuardAction,
    GuardConfig,
    LoggingConfig,
    SlurmConfig,
    TrainConfig,
    WatchdogConfig,
)

__all__ = [
    "AdamImplementation",
    "AdvantageConfig",
    "Aggregation",
    "AlgorithmConfig",
    "CheckpointConfig",
    "Config",
    "ConvergenceConfig",
    "CorrectionConfig",
    "CorrectionLevel",
    "CorrectionMethod",
    "CriticConfig",
    "DataConfig",
    "Divergence",
    "Dtype",
    "DynamicSamplingConfig",
    "EnginePlacement",
    "EvaluationConfig",
    "Fp8Format",
    "Fp8Recipe",
    "GuardAction",
    "GuardConfig",
    "InFlight",
    "KLConfig",
    "KLEstimator",
    "KLPlace",
    "KLReference",
    "LRDecayStyle",
    "LayerSpec",
    "LoggingConfig",
    "ModelConfig",
    "NonFinite",
    "OptimizerConfig",
    "OverlongConfig",
    "ParallelConfig",
    "PolicyLossConfig",
    "PreferenceConfig",
    "QuantizedFormat",
    "Recipe",
    "RewardEngine",
    "RewardFunctionConfig",
    "RewardModelConfig",
    "RewardModelKind",
    "RewardScale",
    "RewardsConfig",
    "RolloutConfig",
    "SamplingConfig",
    "SlurmConfig",
    "StepCredit",
    "SupervisedConfig",
    "SyncConfig",
    "SyncTransport",
    "SyncVerify",
    "TrainConfig",
    "WatchdogConfig",
    "WeightDecayStyle",
    "Whitening",
]


class Recipe(Enum):
    """What kind of training a run is."""

    rl = "rl"
    sft = "sft"
    preference = "preference"
    reward_model = "reward_model"


@dataclass
class Config:
    """A run."""

    name: str = MISSING
    """Name of the run: its folder below output_dir."""
    recipe: Recipe = Recipe.rl
    """rl or sft."""
    seed: int = 1234
    """Seed of data order, sampling and initialisation."""
    output_dir: str = "runs"
    """Parent of the run's folder."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The policy."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the training ranks share the model and the batch."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and schedule."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training and evaluation data."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Generation."""
    sync: SyncConfig = field(default_factory=SyncConfig)
    """Weights to the engines."""
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    """Scores."""
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    """The objective."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length and sizes."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Training state on disk."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Held-out evaluation."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """What a run shows."""
    guards: list[GuardConfig] = field(default_factory=list)
    """Limits of metrics, e.g. of the KL, and what is done beyond them."""
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    """Limits of waiting."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    """What `megatron-rl launch slurm` asks for."""

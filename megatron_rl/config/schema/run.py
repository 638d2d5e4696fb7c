"""The run itself: length, checkpoints, evaluation, records, guards, the watchdog, and what a Slurm job asks for."""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING


class GuardAction(Enum):
    """What a guard does: leave the update out, end the run, or go back to its last checkpoint."""

    skip = "skip"
    stop = "stop"
    rollback = "rollback"


@dataclass
class TrainConfig:
    """Length of the run and size of its steps."""

    num_steps: int = 100
    """RL: rollout steps. SFT: optimizer steps."""
    global_batch_size: int | None = None
    """Samples of one optimizer step. RL: null takes all samples of the rollout step (exactly on-policy)."""
    num_epochs_per_step: int = 1
    """RL: passes over each rollout batch."""
    max_rollbacks: int = 3
    """Times that the run goes back to a checkpoint because of its numbers, before it stops."""
    micro_batch_tokens: int = 8192
    """Tokens of one micro-batch, over all its context-parallel ranks; longer single sequences get a micro-batch of
    their own."""


@dataclass
class CheckpointConfig:
    """Training state on disk."""

    save_interval: int = 50
    """Steps between checkpoints; 0: only by the clock and at the end."""
    save_minutes: float | None = 45.0
    """Minutes between checkpoints, whatever `save_interval` says; null: by steps alone. Steps of large models take
    minutes, and what a failure costs is counted in time (Daly's optimum for a stall of 30 s on 1,024 GPUs is 54)."""
    asynchronous: bool = True
    """Write in the background, from a copy on the host; false: training waits until a checkpoint is complete."""
    keep_last: int | None = None
    """Keep this many newest checkpoints; null: all."""
    keep_best: int = 0
    """Keep besides this many with the best `best_metric`; needs keep_last."""
    best_metric: str | None = None
    """Metric of the saved step that keep_best compares, e.g. 'eval/heldout/accuracy'; '-' before the name: lowest."""
    export_hf: bool = True
    """Write the final policy as a Hugging Face checkpoint to hf/."""


@dataclass
class EvaluationConfig:
    """Evaluation on data.eval with vLLM."""

    interval: int = 0
    """Steps between evaluations; 0: only before and after training."""
    name: str = "heldout"
    """Name in the metrics: eval/<name>/accuracy."""
    num_samples_per_prompt: int = 1
    """k of pass@k; 1 with temperature 0 is greedy accuracy."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Nucleus of the sampling."""
    max_prompts: int | None = None
    """Evaluate the first this many prompts; null: all."""
    correct_reward: str | None = None
    """The reward that decides correctness (value >= 1); null: the first of rewards.functions."""


@dataclass
class ConvergenceConfig:
    """When an RL run is said to have settled; it goes on all the same."""

    window: int = 20
    """Steps that are looked at."""
    loss_variance: float = 1e-4
    """Variance of the policy loss below which it counts as stable."""
    policy_change: float = 1e-3
    """Mean change of log-probs in a step, nats, below which the policy counts as at rest."""


@dataclass
class LoggingConfig:
    """What a run shows."""

    tensorboard: bool = True
    """Write TensorBoard events to <run>/tensorboard."""
    wandb_project: str | None = None
    """Log to this Weights & Biases project, if set."""
    num_logged_rollouts: int = 8
    """Sample rollouts written per step."""
    peak_tflops_per_gpu: float | None = None
    """Peak of a GPU's matrix units in the model's dtype, for throughput/mfu: the operations of the updates' passes
    forward and backward / (timing_s/train * ranks * peak); see `placement/sizes.py`. null: not reported."""
    progress: bool = True
    """Progress bars with ETA."""
    convergence: ConvergenceConfig = field(default_factory=ConvergenceConfig)
    """The convergence monitor."""


@dataclass
class GuardConfig:
    """A limit of one metric of the policy's updates; see `trainer/update.py`."""

    metric: str = MISSING
    """Its name, e.g. 'policy/loss', 'optim/grad_norm', 'policy/approx_kl', 'mismatch/kl'."""
    above: float | None = None
    """The largest value that is allowed."""
    above_deviations: float | None = None
    """Standard deviations over the mean of the last `window` updates that are allowed."""
    window: int = 50
    """Updates that above_deviations looks back on."""
    action: GuardAction = GuardAction.skip
    """skip the update and count it, stop the run, or rollback to the last checkpoint and go on with later data."""


@dataclass
class WatchdogConfig:
    """Limits of time without progress; a collective's own is parallel.distributed_timeout_minutes."""

    enabled: bool = True
    """Watch every rank; false leaves only the collectives' own limit."""
    phase_minutes: float = 60.0
    """Longest that a phase of a step may go without progress; then the run ends with all ranks' stacks in logs/hang."""
    phase_limits: dict[str, float] = field(default_factory=dict)
    """Limits of single phases, minutes: start, generate, score, log_probs, train, sync_weights, evaluate, save, ..."""
    heartbeat_seconds: float = 5.0
    """How often each rank writes where it is to logs/ranks."""


@dataclass
class SlurmConfig:
    """What `megatron-rl launch slurm` asks Slurm for; the options of sbatch by their own names."""

    nodes: int = 1
    """Nodes of the job."""
    ntasks_per_node: int = 8
    """Tasks of a node: one per GPU, or per CPU slot. Each is a training rank or, at the end, part of an engine."""
    gpus_per_node: int | None = None
    """GPUs of a node; null: the partition's default."""
    cpus_per_task: int | None = None
    """CPU cores of a rank; null: the partition's default."""
    time: str | None = None
    """Limit of one attempt, e.g. '24:00:00'; the run saves before it and is queued again."""
    partition: str | None = None
    """Partition; null: the cluster's default."""
    account: str | None = None
    """Account that is charged."""
    qos: str | None = None
    """Quality of service."""
    signal_seconds: int = 180
    """The ranks are told to save this long before the time limit; longer than a step and a checkpoint."""
    max_restarts: int = 3
    """Starts after a failure inside one job without a new checkpoint, besides those that Slurm makes."""
    container: str | None = None
    """Image that the ranks run in; null: none."""
    container_runtime: str = "pyxis"
    """'pyxis' or 'apptainer'."""
    container_mounts: str | None = None
    """'from:to,...' besides the working folder."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of the job, e.g. MASTER_ADDR, MEGATRON_RL (the program)."""
    sbatch_args: list[str] = field(default_factory=list)
    """Further options of sbatch, e.g. '--constraint=h200'."""
    script: str = "slurm/train.sbatch"
    """The job."""

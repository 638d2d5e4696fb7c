"""What a job asks for."""

from dataclasses import dataclass, field


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
    """Starts after a failure inside one job, besides those that Slurm makes."""
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

"""The allowed range of every number of the schema, as data.

In the notation of intervals: `[1, inf)` is "at least 1", `(0, 1]` is "more than 0, at most 1". Optional fields may
also be null. A number without a range here fails the tests, so a new field cannot go unchecked.
"""

import math

from megatron_rl.config.errors import ConfigError, shown
from megatron_rl.config.schema import Config

RANGES = {
    "seed": "[0, 2147483647]",
    "model.recompute_num_layers": "[1, inf)",
    "model.num_layers_at_start_in_bf16": "[0, inf)",
    "model.num_layers_at_end_in_bf16": "[0, inf)",
    "parallel.tensor_model_parallel_size": "[1, inf)",
    "parallel.pipeline_model_parallel_size": "[1, inf)",
    "parallel.virtual_pipeline_model_parallel_size": "[2, inf)",
    "parallel.num_layers_in_first_pipeline_stage": "[1, inf)",
    "parallel.num_layers_in_last_pipeline_stage": "[1, inf)",
    "parallel.context_parallel_size": "[1, inf)",
    "parallel.expert_model_parallel_size": "[1, inf)",
    "parallel.expert_tensor_parallel_size": "[1, inf)",
    "parallel.data_parallel_size": "[1, inf)",
    "parallel.distributed_timeout_minutes": "(0, inf)",
    "optimizer.lr": "[0, inf)",
    "optimizer.min_lr": "[0, inf)",
    "optimizer.lr_warmup_steps": "[0, inf)",
    "optimizer.lr_decay_steps": "[1, inf)",
    "optimizer.weight_decay": "[0, inf)",
    "optimizer.end_weight_decay": "[0, inf)",
    "optimizer.adam_beta1": "[0, 1)",
    "optimizer.adam_beta2": "[0, 1)",
    "optimizer.adam_eps": "(0, inf)",
    "optimizer.clip_grad": "[0, inf)",
    "data.max_prompt_tokens": "[1, inf)",
    "rollout.num_engines": "[1, inf)",
    "rollout.num_prompts_per_step": "[1, inf)",
    "rollout.num_samples_per_prompt": "[1, inf)",
    "rollout.tensor_model_parallel_size": "[1, inf)",
    "rollout.sampling.temperature": "(0, inf)",
    "rollout.sampling.max_response_tokens": "[1, inf)",
    "rollout.max_model_len": "[2, inf)",
    "rollout.max_num_seqs": "[1, inf)",
    "rollout.kv_cache_gigabytes": "(0, inf)",
    "rollout.start_minutes": "(0, inf)",
    "rollout.request_minutes": "(0, inf)",
    "rollout.max_mismatch": "(0, inf)",
    "rollout.gpu_memory_utilization": "(0, 1]",
    "sync.bucket_megabytes": "(0, inf)",
    "sync.delta": "[0, 1]",
    "sync.timeout_seconds": "(0, inf)",
    "sync.verify_tolerance": "(0, inf)",
    "algorithm.advantage.std_correction": "[0, 1]",
    "algorithm.advantage.std_epsilon": "(0, inf)",
    "algorithm.policy_loss.clip_low": "[0, 1]",
    "algorithm.policy_loss.clip_high": "[0, inf)",
    "algorithm.policy_loss.dual_clip": "(1, inf)",
    "algorithm.kl.coefficient": "[0, inf)",
    "algorithm.advantage.gamma": "[0, 1]",
    "algorithm.advantage.lam": "[0, 1]",
    "algorithm.advantage.baseline_decay": "[0, 1]",
    "algorithm.correction.low": "[0, inf)",
    "algorithm.correction.high": "(0, inf)",
    "algorithm.kl.mixture": "(0, 1)",
    "algorithm.kl.target": "(0, inf)",
    "algorithm.kl.horizon": "[1, inf)",
    "algorithm.kl.refresh_interval": "[1, inf)",
    "algorithm.kl.moving_average_decay": "[0, 1]",
    "algorithm.critic.coefficient": "(0, inf)",
    "algorithm.critic.warmup_steps": "[0, inf)",
    "algorithm.critic.clip": "(0, inf)",
    "algorithm.dynamic_sampling.max_rounds": "[1, inf)",
    "algorithm.supervised.coefficient": "[0, inf)",
    "algorithm.preference.beta": "(0, inf)",
    "algorithm.preference.label_smoothing": "[0, 0.5)",
    "algorithm.preference.sft_coefficient": "[0, inf)",
    "rewards.model.weight": "(-inf, inf)",
    "rewards.overlong.buffer_tokens": "[1, inf)",
    "rewards.overlong.penalty": "[0, inf)",
    "algorithm.entropy_coefficient": "[0, inf)",
    "algorithm.token_sum_norm": "(0, inf)",
    "train.num_steps": "[1, inf)",
    "train.global_batch_size": "[1, inf)",
    "train.num_epochs_per_step": "[1, inf)",
    "train.max_rollbacks": "[0, inf)",
    "train.micro_batch_tokens": "[1, inf)",
    "checkpoint.save_interval": "[0, inf)",
    "checkpoint.save_minutes": "(0, inf)",
    "checkpoint.keep_last": "[1, inf)",
    "checkpoint.keep_best": "[0, inf)",
    "evaluation.interval": "[0, inf)",
    "evaluation.num_samples_per_prompt": "[1, inf)",
    "evaluation.temperature": "[0, inf)",
    "evaluation.top_p": "(0, 1]",
    "evaluation.max_prompts": "[1, inf)",
    "logging.num_logged_rollouts": "[0, inf)",
    "logging.peak_tflops_per_gpu": "(0, inf)",
    "rewards.num_workers": "[0, inf)",
    "rewards.timeout_seconds": "(0, inf)",
    "rewards.memory_gigabytes": "(0, inf)",
    "rewards.lost_value": "(-inf, inf)",
    "rewards.unreadable_references": "[0, 1]",
    "watchdog.phase_minutes": "(0, inf)",
    "watchdog.heartbeat_seconds": "(0, inf)",
    "slurm.nodes": "[1, inf)",
    "slurm.ntasks_per_node": "[1, inf)",
    "slurm.gpus_per_node": "[0, inf)",
    "slurm.cpus_per_task": "[1, inf)",
    "slurm.signal_seconds": "[0, 65535]",
    "slurm.max_restarts": "[0, inf)",
    "logging.convergence.window": "[2, inf)",
    "logging.convergence.loss_variance": "[0, inf)",
    "logging.convergence.policy_change": "[0, inf)",
}

RANGES |= {
    key.replace("optimizer.", "algorithm.critic.optimizer."): interval
    for key, interval in RANGES.items()
    if key.startswith("optimizer.")
}


def contains(interval: str, number: float) -> bool:
    """Whether the number lies in an interval written like '[0, 1)'. nan lies in none."""
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = number >= low if interval[0] == "[" else number > low
    below = number <= high if interval[-1] == "]" else number < high
    return above and below


def check_ranges(config: Config) -> None:
    """Raise ConfigError for the first number that is out of its range."""
    for key, interval in RANGES.items():
        value: object = config
        for name in key.split("."):
            value = getattr(value, name)
        if value is not None and not (isinstance(value, int | float) and contains(interval, value)):
            raise ConfigError(f"{key}: given {shown(value)}, allowed: {interval}")
    for i, function in enumerate(config.rewards.functions):
        if not math.isfinite(function.weight):
            raise ConfigError(f"rewards.functions[{i}].weight: given {function.weight}, allowed: (-inf, inf)")
    for i, guard in enumerate(config.guards):
        for name, interval in (("above", "(-inf, inf)"), ("above_deviations", "(0, inf)"), ("window", "[5, inf)")):
            number = getattr(guard, name)
            if number is not None and not contains(interval, number):
                raise ConfigError(f"guards[{i}].{name}: given {shown(number)}, allowed: {interval}")
        if guard.above is None and guard.above_deviations is None:
            raise ConfigError(f"guards[{i}]: given neither above nor above_deviations, allowed: one or both")
    for phase, minutes in config.watchdog.phase_limits.items():
        if not contains("(0, inf)", minutes):
            raise ConfigError(f"watchdog.phase_limits.{phase}: given {minutes}, allowed: (0, inf)")

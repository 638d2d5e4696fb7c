"""Held-out evaluation with the engines: accuracy, pass@k and mean reward."""

from collections.abc import Sequence

from megatron_rl.algorithms.metrics import Metric
from megatron_rl.config.schema import Config
from megatron_rl.data.samples import Prompt, Sample
from megatron_rl.rollout.engine import Sampling
from megatron_rl.runs.progress import Progress
from megatron_rl.trainer.rollouts import RolloutWorker, draw_seeds

# Evaluation draws its own seeds; this keeps them apart from those of training.
_EVALUATION_STREAM = 1 << 32


def evaluate(
    config: Config, worker: RolloutWorker, prompts: Sequence[Prompt], progress: Progress
) -> tuple[dict[str, float], list[list[Sample]]]:
    """Complete every prompt and score it; collective.

    Returns:
        Metrics eval/<name>/{accuracy, pass_at_k, reward_mean, response_length_mean, truncated_fraction}, the mean of
        each reward as eval/<name>/reward/<reward>, and the samples by prompt. A sample is correct if the deciding
        reward is at least 1; accuracy is the mean over all samples, pass_at_k the part of the prompts with at least
        one correct sample of its k.
    """
    settings = config.evaluation
    chosen = prompts[: settings.max_prompts]
    sampling = Sampling(
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_response_tokens=config.rollout.sampling.max_response_tokens,
        stop=tuple(config.rollout.sampling.stop),
    )
    seeds = draw_seeds(config.seed, _EVALUATION_STREAM, len(chosen))
    completions = worker.generate(chosen, seeds, sampling, settings.num_samples_per_prompt, progress)
    samples = worker.score(chosen, completions)
    deciding = settings.correct_reward or worker.rewards[0].name
    correct = [[sample.reward_terms[deciding] >= 1.0 for sample in of_prompt] for of_prompt in samples]
    everything = [sample for of_prompt in samples for sample in of_prompt]
    name = f"eval/{settings.name}"
    metrics = {
        f"{name}/accuracy": _mean([mark for marks in correct for mark in marks]),
        f"{name}/reward_mean": _mean([sample.reward for sample in everything]),
        f"{name}/response_length_mean": _mean([len(sample.completion.token_ids) for sample in everything]),
        f"{name}/truncated_fraction": _mean([sample.completion.finish_reason == "length" for sample in everything]),
    }
    for reward in everything[0].reward_terms if everything else ():
        metrics[f"{name}/reward/{reward}"] = _mean([sample.reward_terms[reward] for sample in everything])
    if settings.num_samples_per_prompt > 1:
        metrics[f"{name}/pass_at_k"] = _mean([any(marks) for marks in correct])
    return metrics, samples


def _mean(values: Sequence[float]) -> float:
    return Metric("mean", float(sum(values)), len(values)).result()

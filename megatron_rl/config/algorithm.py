"""What the choices of an algorithm may not be, and what the further checkpoints that they name must be."""

from pathlib import Path
from typing import NoReturn

from megatron_rl.config.errors import ConfigError
from megatron_rl.config.hf_checkpoint import check_weights, read_json_object
from megatron_rl.config.load import shown
from megatron_rl.config.schema import Config, CorrectionMethod, KLPlace, KLReference, RewardModelKind

_OF_GROUPS = ("group_relative", "leave_one_out")
_HEADS = {
    RewardModelKind.outcome: "ForSequenceClassification",
    RewardModelKind.process: "ForTokenClassification",
}


def check_algorithm(config: Config) -> None:
    """Raise ConfigError for the first choice of an RL run that contradicts another."""
    algorithm, rollout = config.algorithm, config.rollout
    num_samples = rollout.num_samples_per_prompt
    if num_samples < 2 and algorithm.advantage.estimator in _OF_GROUPS:
        _refuse("rollout.num_samples_per_prompt", 1, "[2, inf): alone in its group, a sample has advantage 0")
    if num_samples < 2 and algorithm.dynamic_sampling.max_rounds > 1:
        _refuse(
            "algorithm.dynamic_sampling.max_rounds",
            algorithm.dynamic_sampling.max_rounds,
            "1 with rollout.num_samples_per_prompt=1: a sample alone has nothing to differ from",
        )
    correction = algorithm.correction
    if correction.method is not CorrectionMethod.metrics_only and correction.low >= correction.high:
        _refuse("algorithm.correction.low", correction.low, f"less than algorithm.correction.high {correction.high}")
    kl, step_samples = algorithm.kl, rollout.num_prompts_per_step * num_samples
    if kl.target is not None and kl.horizon < step_samples:
        _refuse("algorithm.kl.horizon", kl.horizon, f"at least {step_samples}, the samples of a step, with a target")
    if kl.reference_path is not None and kl.reference is not KLReference.fixed:
        _refuse("algorithm.kl.reference", kl.reference.value, "fixed with algorithm.kl.reference_path")
    buffer, limit = config.rewards.overlong.buffer_tokens, rollout.sampling.max_response_tokens
    if buffer is not None and buffer > limit:
        _refuse("rewards.overlong.buffer_tokens", buffer, f"at most {limit}, rollout.sampling.max_response_tokens")


def check_supervised(config: Config) -> None:
    """Raise ConfigError for the first choice of a supervised run that has no meaning there: its penalty is exact."""
    algorithm, kl = config.algorithm, config.algorithm.kl
    if kl.place is not KLPlace.loss:
        _refuse("algorithm.kl.place", kl.place.value, "loss with recipe sft, which has no rewards")
    if kl.reference is not KLReference.fixed:
        _refuse("algorithm.kl.reference", kl.reference.value, "fixed with recipe sft")
    if kl.target is not None:
        _refuse("algorithm.kl.target", kl.target, "null with recipe sft: the coefficient stays")
    if not algorithm.supervised.coefficient and not kl.coefficient:
        _refuse("algorithm.supervised.coefficient", 0.0, "above 0 unless algorithm.kl.coefficient is")


def check_checkpoints(config: Config) -> None:
    """Raise ConfigError for the first further checkpoint that cannot be read, or is of another kind than it must be."""
    reward = config.rewards.model
    for key, path, ending in (
        ("rewards.model.hf_path", reward.hf_path, _HEADS[reward.kind]),
        ("algorithm.critic.hf_path", config.algorithm.critic.hf_path, ""),
        ("algorithm.kl.reference_path", config.algorithm.kl.reference_path, "ForCausalLM"),
    ):
        if path is None:
            continue
        if not Path(path).is_dir():
            _refuse(key, path, "a Hugging Face checkpoint folder")
        (architecture, *_) = read_json_object(Path(path) / "config.json", key).get("architectures") or ["none"]
        if not str(architecture).endswith(ending):
            _refuse(key, f"architecture {architecture}", f"one that ends in {ending}")
        check_weights(Path(path), key)


def _refuse(key: str, given: object, allowed: str) -> NoReturn:
    raise ConfigError(f"{key}: given {shown(given)}, allowed: {allowed}")

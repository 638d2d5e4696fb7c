"""What the choices of an algorithm may not be, and what the further checkpoints that they name must be."""

from pathlib import Path

from megatron_rl.config.errors import refuse, shown
from megatron_rl.config.hf_checkpoint import check_weights, read_json_object
from megatron_rl.config.schema import (
    Config,
    CorrectionMethod,
    KLEstimator,
    KLPlace,
    KLReference,
    Recipe,
    RewardModelKind,
    StepCredit,
)

_OF_SEQUENCES = ("ppo_trajectory", "gspo", "gspo_token")
_OF_GROUPS = ("group_relative", "leave_one_out", "length_weighted")
_HEADS = {
    RewardModelKind.outcome: "ForSequenceClassification",
    RewardModelKind.process: "ForTokenClassification",
}


def check_algorithm(config: Config) -> None:
    """Raise ConfigError for the first choice that contradicts another."""
    if config.recipe is Recipe.rl:
        _check_rl(config)
    elif config.recipe is Recipe.sft:
        _check_sft(config)


def _check_sft(config: Config) -> None:
    kl = config.algorithm.kl
    if kl.coefficient:
        # The tokens of a data set are no samples of the policy, from which the others could estimate.
        if kl.estimator is not KLEstimator.exact:
            refuse("algorithm.kl.estimator", kl.estimator.value, "exact with recipe sft and a coefficient")
        for name, allowed in (("target", None), ("reference", KLReference.fixed)):
            if (given := getattr(kl, name)) is not allowed:
                refuse(f"algorithm.kl.{name}", getattr(given, "value", given), f"{shown(allowed)} with recipe sft")
        _check_exact_kl(config)
    elif config.algorithm.supervised.coefficient == 0:
        refuse("algorithm.supervised.coefficient", 0.0, "more than 0 with algorithm.kl.coefficient 0")


def _check_exact_kl(config: Config) -> None:
    kl = config.algorithm.kl
    if kl.place is not KLPlace.loss:
        refuse("algorithm.kl.place", kl.place.value, "loss with algorithm.kl.estimator=exact")
    if kl.weighted:
        refuse("algorithm.kl.weighted", True, "false with algorithm.kl.estimator=exact: no samples")


def _check_critic(config: Config) -> None:
    critic = config.algorithm.critic
    if critic.shared and critic.warmup_steps:
        # The backbone is the policy's: there is no critic to be trained alone.
        refuse("algorithm.critic.warmup_steps", critic.warmup_steps, "0 with algorithm.critic.shared")
    if critic.shared and critic.hf_path is not None:
        refuse("algorithm.critic.hf_path", critic.hf_path, "null with algorithm.critic.shared")


def _check_rl(config: Config) -> None:
    algorithm, rollout = config.algorithm, config.rollout
    _check_critic(config)
    if algorithm.kl.coefficient and algorithm.kl.estimator is KLEstimator.exact:
        _check_exact_kl(config)
        # Its gradient is formed token by token, while the logits of a few tokens are there.
        loss = algorithm.policy_loss.name
        if loss in _OF_SEQUENCES or ":" in loss:
            refuse("algorithm.policy_loss.name", loss, "a built-in loss of tokens with algorithm.kl.estimator=exact")
        if algorithm.critic.shared:
            refuse("algorithm.critic.shared", True, "false with algorithm.kl.estimator=exact")
    num_samples = rollout.num_samples_per_prompt
    if num_samples < 2 and algorithm.advantage.estimator in _OF_GROUPS:
        refuse("rollout.num_samples_per_prompt", 1, "[2, inf): alone in its group, a sample has advantage 0")
    if num_samples < 2 and algorithm.dynamic_sampling.max_rounds > 1:
        refuse(
            "algorithm.dynamic_sampling.max_rounds",
            algorithm.dynamic_sampling.max_rounds,
            "1 with rollout.num_samples_per_prompt=1: a sample alone has nothing to differ from",
        )
    correction = algorithm.correction
    if correction.method is not CorrectionMethod.metrics_only and correction.low >= correction.high:
        refuse("algorithm.correction.low", correction.low, f"less than algorithm.correction.high {correction.high}")
    kl, step_samples = algorithm.kl, rollout.num_prompts_per_step * num_samples
    if kl.target is not None and kl.horizon < step_samples:
        refuse("algorithm.kl.horizon", kl.horizon, f"at least {step_samples}, the samples of a step, with a target")
    if kl.reference_path is not None and kl.reference is not KLReference.fixed:
        refuse("algorithm.kl.reference", kl.reference.value, "fixed with algorithm.kl.reference_path")
    learned = config.rewards.model
    if learned.kind is RewardModelKind.outcome and learned.credit is not StepCredit.step_end:
        refuse(
            "rewards.model.credit", learned.credit.value, "step_end with rewards.model.kind=outcome: it has no steps"
        )
    buffer, limit = config.rewards.overlong.buffer_tokens, rollout.sampling.max_response_tokens
    if buffer is not None and buffer > limit:
        refuse("rewards.overlong.buffer_tokens", buffer, f"at most {limit}, rollout.sampling.max_response_tokens")


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
            refuse(key, path, "a Hugging Face checkpoint folder")
        (architecture, *_) = read_json_object(Path(path) / "config.json", key).get("architectures") or ["none"]
        if not str(architecture).endswith(ending):
            refuse(key, f"architecture {architecture}", f"one that ends in {ending}")
        check_weights(Path(path), key)

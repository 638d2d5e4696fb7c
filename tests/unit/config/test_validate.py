"""Validation: a sound configuration passes, and each rule refuses what breaks it, naming the key."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rl.config.errors import ConfigError
from megatron_rl.config.hf_checkpoint import SUPPORTED_ARCHITECTURES, ModelShape
from megatron_rl.config.load import load_config
from megatron_rl.config.schema import Config, ParallelConfig, Recipe
from megatron_rl.config.validate import check_files, check_model, check_values, validate
from megatron_rl.config.world import data_parallel_size
from megatron_rl.models.families import FAMILIES

SHAPE = ModelShape(
    architecture="Qwen3ForCausalLM",
    num_hidden_layers=6,
    num_attention_heads=12,
    num_key_value_heads=4,
    hidden_size=96,
    intermediate_size=120,
    vocab_size=37,
    max_position_embeddings=1280,  # the default prompt and response: 1024 + 256
)
RL = ("name=run", "model.hf_path=m", "data.train=t.jsonl", "rewards.functions=[{name: exact_match}]")
SFT = ("name=run", "recipe=sft", "model.hf_path=m", "data.train=t.jsonl", "train.global_batch_size=8")


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    path = tmp_path / "empty.yaml"
    path.write_text("")
    return path


def verdict(path: Path, keys: Sequence[str], world_size: int | None = None, *, evaluates: bool = False) -> str | None:
    """The error of the values or of the model; None if there is none."""
    config: Config = load_config(path, keys)
    generates = evaluates or config.recipe is Recipe.rl
    try:
        check_values(config, world_size=world_size, generates=generates)
        check_model(config, SHAPE, generates=generates)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("keys", "world_size"),
    [
        ((*RL,), None),
        ((*RL, "parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"), 4),
        ((*RL, "parallel.tensor_model_parallel_size=4", "rollout.tensor_model_parallel_size=2"), 8),
        ((*RL, "parallel.tensor_model_parallel_size=12"), 12),  # 3 times the 4 key-value heads
        ((*RL, "parallel.pipeline_model_parallel_size=3", "parallel.data_parallel_size=2"), 6),
        ((*RL, "train.global_batch_size=32", "optimizer.lr_warmup_steps=399"), None),  # 100 steps x 128 / 32 updates
        ((*RL, "data.eval=e.jsonl", "evaluation.interval=5", "evaluation.correct_reward=exact_match"), None),
        ((*RL, "rollout.max_model_len=1280"), None),
        ((*RL, "algorithm.aggregation=token_sum_norm", "algorithm.token_sum_norm=100"), None),
        ((*SFT,), None),
        ((*SFT, "rollout.tensor_model_parallel_size=7", "rollout.max_model_len=9999"), 2),  # no engine
    ],
)
def test_what_is_sound_passes(empty: Path, keys: Sequence[str], world_size: int | None) -> None:
    assert verdict(empty, keys, world_size) is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["name=a/b"], "name: given 'a/b', allowed: letters, digits, '.', '_' and '-', the first a letter or digit"),
        (["name=.."], "name: given '..', allowed: letters"),
        (
            [*RL, "rollout.placement=disaggregated", "sync.timeout_seconds=300"],
            "sync.timeout_seconds: given 300.0, allowed: at most 270 s with parallel.distributed_timeout_minutes=10",
        ),
        (
            [*RL, "rollout.placement=disaggregated", "watchdog.phase_limits.sync_weights=5"],
            "watchdog.phase_limits.sync_weights: given 5.0, allowed: at least 9, twice sync.timeout_seconds",
        ),
        ([*RL, "sync.delta=0.1"], "sync.delta: given 0.1, allowed: 0 without rollout.placement=disaggregated"),
        (
            [*RL, "rollout.placement=disaggregated", "sync.delta=0.1", "sync.transport=process_group"],
            "sync.delta: given 0.1, allowed: 0 with sync.transport=process_group, whose messages have one length",
        ),
        (["train.micro_batch_tokens=0"], "train.micro_batch_tokens: given 0, allowed: [1, inf)"),
        (
            ["model.recompute_granularity=some"],
            "model.recompute_granularity: given 'some', allowed: null, selective, full",
        ),
        (["model.recompute_granularity=full"], "model.recompute_method: given null, allowed: uniform, block"),
        (
            ["model.recompute_granularity=full", "model.recompute_method=block"],
            "model.recompute_num_layers: given null, allowed: [1, inf)",
        ),
        (["model.recompute_num_layers=2"], "model.recompute_num_layers: given 2, allowed: null without"),
        (
            [
                "model.recompute_granularity=full",
                "model.recompute_method=block",
                "model.recompute_num_layers=4",
                "parallel.pipeline_model_parallel_size=2",
            ],
            "model.recompute_num_layers: given 4, allowed: [1, 3], a stage's layers",
        ),
        (
            ["model.transformer_config.sequence_parallel=true"],
            "model.transformer_config.sequence_parallel: given True, allowed: only by parallel.sequence_parallel",
        ),
        (
            ["model.transformer_config.context_parallel_size=2"],
            "model.transformer_config.context_parallel_size: given 2, allowed: only by parallel.context_parallel_size",
        ),
        (
            ["rollout.engine_args.max_num_seqs=2"],
            "rollout.engine_args.max_num_seqs: given 2, allowed: only by rollout.max_num_seqs",
        ),
        (["data.format=csv"], "data.format: given 'csv', allowed: jsonl, parquet, gsm8k"),
        (["data.train=null"], "data.train: given null, allowed: a file"),
        (["rewards.functions=[]"], "rewards.functions: given [], allowed: at least one reward, to score completions"),
        (["evaluation.correct_reward=other"], "evaluation.correct_reward: given 'other', allowed: exact_match"),
        (["evaluation.interval=5"], "evaluation.interval: given 5, allowed: 0 without data.eval"),
        (
            ["data.eval=e.jsonl", "evaluation.num_samples_per_prompt=4"],
            "evaluation.num_samples_per_prompt: given 4, allowed: 1 with evaluation.temperature 0",
        ),
        (["parallel.sequence_parallel=true"], "parallel.sequence_parallel: given True, allowed: true only with"),
        (["rollout.num_samples_per_prompt=1"], "rollout.num_samples_per_prompt: given 1, allowed: [2, inf)"),
        (
            ["train.global_batch_size=48"],
            "train.global_batch_size: given 48, allowed: a divisor of the 128 samples of a rollout step",
        ),
        (
            ["parallel.data_parallel_size=32"],
            "rollout.num_prompts_per_step: given 16, allowed: at least 32, one per engine",
        ),
        (
            ["parallel.data_parallel_size=4", "train.global_batch_size=2"],
            "train.global_batch_size: given 2, allowed: at least 4, one per replica",
        ),
        (
            ["train.global_batch_size=32", "optimizer.lr_warmup_steps=400"],
            "optimizer.lr_warmup_steps: given 400, allowed: less than the 400 steps of the schedule",
        ),
        (["optimizer.lr_decay_style=exponential"], "optimizer.min_lr: given 0.0, allowed: above 0 with lr_decay_style"),
        (["optimizer.min_lr=1"], "optimizer.min_lr: given 1.0, allowed: at most optimizer.lr 1e-06"),
        (["algorithm.token_sum_norm=9"], "algorithm.token_sum_norm: given 9.0, allowed: null unless"),
        (
            ["rollout.max_model_len=1279"],
            "rollout.max_model_len: given 1279, allowed: at least 1280 = data.max_prompt_tokens + "
            "rollout.sampling.max_response_tokens",
        ),
        (
            ["data.max_prompt_tokens=1025"],
            "data.max_prompt_tokens + rollout.sampling.max_response_tokens: given 1281, allowed: at most 1280, the "
            "model's max_position_embeddings",
        ),
        (["rollout.max_model_len=1281"], "rollout.max_model_len: given 1281, allowed: at most 1280"),
        (["rollout.sampling.stop=['']"], "rollout.sampling.stop: given [''], allowed: strings that are not empty"),
        (
            ["parallel.tensor_model_parallel_size=5"],
            "parallel.tensor_model_parallel_size: given 5, allowed: a divisor of the model's 12 attention heads",
        ),
        (
            ["parallel.tensor_model_parallel_size=6"],
            "parallel.tensor_model_parallel_size: given 6, allowed: a divisor or a multiple of the model's 4 key-value",
        ),
        (
            ["parallel.pipeline_model_parallel_size=4"],
            "parallel.pipeline_model_parallel_size: given 4, allowed: a divisor of the model's 6 layers",
        ),
        (
            ["parallel.virtual_pipeline_model_parallel_size=2"],
            "parallel.virtual_pipeline_model_parallel_size: given 2, allowed: null without pipeline_model_parallel",
        ),
        (
            ["parallel.expert_model_parallel_size=2"],
            "parallel.expert_model_parallel_size x expert_tensor_parallel_size: given 2, allowed: a divisor of the 1",
        ),
        (
            ["parallel.expert_tensor_parallel_size=2", "parallel.data_parallel_size=2"],
            "parallel.expert_tensor_parallel_size: given 2, allowed: 1 for a model without experts",
        ),
        (
            ["rollout.record_routes=true"],
            "rollout.record_routes: given True, allowed: false without model.moe_routing_replay",
        ),
        (
            ["rollout.record_routes=true", "model.moe_routing_replay=true", "rollout.enforce_eager=false"],
            "rollout.record_routes: given True, allowed: false without rollout.enforce_eager",
        ),
        (
            ["model.transformer_config.moe_router_load_balancing_type=seq_aux_loss"],
            "model.transformer_config.moe_router_load_balancing_type: given 'seq_aux_loss', allowed: none, aux_loss",
        ),
        (
            ["model.transformer_config.moe_aux_loss_coeff=0.1"],
            "model.transformer_config.moe_aux_loss_coeff: given 0.1, allowed: 0 without moe_router_load_balancing",
        ),
        (
            ["parallel.expert_model_parallel_size=2", "parallel.data_parallel_size=2"],
            "parallel.expert_model_parallel_size: given 2, allowed: 1 for a model without experts",
        ),
        (
            ["parallel.data_parallel_size=3", "rollout.tensor_model_parallel_size=2"],
            "rollout.tensor_model_parallel_size: given 2, allowed: a divisor of the 3 ranks",
        ),
        (
            ["parallel.data_parallel_size=5", "rollout.tensor_model_parallel_size=5"],
            "rollout.tensor_model_parallel_size: given 5, allowed: a divisor of the model's 12 attention heads",
        ),
    ],
)
def test_what_is_not_is_refused(empty: Path, keys: Sequence[str], message: str) -> None:
    given = verdict(empty, [*RL, *keys])
    assert given is not None
    assert given.startswith(message)
    assert "\n" not in given


def test_what_vllm_cannot_hold_twice_is_refused(empty: Path) -> None:
    keys = [*RL, "parallel.tensor_model_parallel_size=4", "rollout.tensor_model_parallel_size=4"]
    few = replace(SHAPE, num_key_value_heads=2)
    check_model(load_config(empty, keys), few, generates=True)
    with pytest.raises(ConfigError, match=r"rollout.tensor_model_parallel_size: given 4, allowed: at most 2, the key-"):
        check_model(load_config(empty, keys), replace(few, architecture="GptOssForCausalLM"), generates=True)


def test_sft_needs_a_batch_size(empty: Path) -> None:
    no_batch = verdict(empty, [*SFT, "train.global_batch_size=null"])
    assert no_batch == "train.global_batch_size: given null, allowed: [1, inf) with recipe sft"
    too_long = verdict(empty, [*SFT, "rollout.sampling.max_response_tokens=257"])
    assert too_long is not None
    assert too_long.startswith("data.max_prompt_tokens + rollout.sampling.max_response_tokens: given 1281")


def test_an_sft_run_that_is_evaluated_generates(empty: Path) -> None:
    assert verdict(empty, SFT) is None
    no_reward = verdict(empty, SFT, evaluates=True)
    assert no_reward == "rewards.functions: given [], allowed: at least one reward, to score completions"
    engines = verdict(empty, [*SFT, "rollout.tensor_model_parallel_size=2"], evaluates=True)
    assert engines == "rollout.tensor_model_parallel_size: given 2, allowed: a divisor of the 1 ranks"


def test_replicas_fill_the_world() -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=3)
    assert data_parallel_size(parallel, 24) == 4  # 24 / (2 x 3)
    assert data_parallel_size(parallel, None) == 1
    with pytest.raises(ConfigError, match="2 x pipeline_model_parallel_size 3 for 8 ranks, allowed: a divisor"):
        data_parallel_size(parallel, 8)
    parallel.data_parallel_size = 5
    assert data_parallel_size(parallel, None) == 5
    assert data_parallel_size(parallel, 30) == 5
    with pytest.raises(ConfigError, match=r"x data_parallel_size 5 = 30, allowed: 24, the number of ranks"):
        data_parallel_size(parallel, 24)


def test_experts_are_divided(empty: Path) -> None:
    shape = ModelShape(**{**SHAPE.__dict__, "num_experts": 6})
    four = ["parallel.data_parallel_size=4", "parallel.expert_model_parallel_size=4"]
    with pytest.raises(ConfigError, match="given 4, allowed: a divisor of the model's 6 experts"):
        check_model(load_config(empty, [*SFT, *four]), shape, generates=False)
    with pytest.raises(ConfigError, match="sequence_parallel: given False, allowed: true for a model with experts"):
        check_model(load_config(empty, [*SFT, "parallel.tensor_model_parallel_size=2"]), shape, generates=False)


def test_an_expert_is_divided(empty: Path) -> None:
    shape = ModelShape(**{**SHAPE.__dict__, "num_experts": 4, "expert_intermediate_size": 45})
    layout = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
    with pytest.raises(
        ConfigError, match="expert_tensor_parallel_size: given 2, allowed: a divisor of the 45 channels"
    ):
        check_model(load_config(empty, [*SFT, *layout]), shape, generates=False)
    spread = [*layout, "parallel.expert_model_parallel_size=2", "parallel.expert_tensor_parallel_size=1"]
    check_model(load_config(empty, [*SFT, *spread]), shape, generates=False)
    biased = ModelShape(**{**shape.__dict__, "expert_intermediate_size": 48, "architecture": "GptOssForCausalLM"})
    with pytest.raises(ConfigError, match="size: given 2, allowed: 1 for GptOssForCausalLM, whose experts have biases"):
        check_model(load_config(empty, [*SFT, *layout]), biased, generates=False)
    check_model(load_config(empty, [*SFT, *spread]), biased, generates=False)


def test_the_mlp_is_divided_too(empty: Path) -> None:
    config = load_config(empty, [*RL, "parallel.tensor_model_parallel_size=4"])
    shape = ModelShape(**{**SHAPE.__dict__, "intermediate_size": 90})
    with pytest.raises(ConfigError, match="given 4, allowed: a divisor of intermediate_size 90"):
        check_model(config, shape, generates=True)


def test_architectures(empty: Path) -> None:
    config = load_config(empty, RL)
    with pytest.raises(ConfigError, match="given 'architecture Qwen3ForCausalLM', allowed: LlamaForCausalLM"):
        check_model(config, SHAPE, generates=True, architectures=["LlamaForCausalLM"])
    assert set(SUPPORTED_ARCHITECTURES) == set(FAMILIES)


def test_files(empty: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "t.jsonl").write_text("{}")
    keys = [*RL, f"model.hf_path={tmp_path}", f"data.train={tmp_path}/t.jsonl"]
    with pytest.raises(ConfigError, match="no weights in"):
        check_files(load_config(empty, keys))
    keys.append("model.load_weights=false")
    check_files(load_config(empty, keys))
    with pytest.raises(ConfigError, match=r"data.eval: given '.*/e.jsonl', allowed: an existing file"):
        check_files(load_config(empty, [*keys, f"data.eval={tmp_path}/e.jsonl"]))
    with pytest.raises(ConfigError, match=r"data\.train: given"):
        check_files(load_config(empty, [*keys, "data.train=nowhere.jsonl"]))


def test_values_are_checked_before_files(empty: Path) -> None:
    with pytest.raises(ConfigError, match="seed: given -1"):
        validate(load_config(empty, [*RL, "seed=-1"]), world_size=None)
    with pytest.raises(ConfigError, match=r"model\.hf_path: given 'm', which is no folder"):
        validate(load_config(empty, RL), world_size=None)

"""Every YAML file of configs/ loads, and fits the model that it names."""

from pathlib import Path

import pytest

from megatron_rl.config.hf_checkpoint import ModelShape
from megatron_rl.config.load import load_config
from megatron_rl.config.schema import Aggregation, Recipe
from megatron_rl.config.validate import check_model, check_values
from megatron_rl.rewards.scoring import resolve_rewards

CONFIGS = Path(__file__).parents[3] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
RECIPES = sorted(CONFIGS.glob("recipes/*.yaml"))
STAND_INS = {
    "name": "a",
    "model.hf_path": "m",
    "data.train": "t.jsonl",
    "rewards.functions": "[{name: exact_match}]",
}


def shape(architecture: str, layers: int, heads: int, groups: int, hidden: int, ffn: int, length: int) -> ModelShape:
    return ModelShape(architecture, layers, heads, groups, hidden, ffn, 151936, length)


# From the config.json of the published checkpoints.
PUBLISHED = {
    "Llama-3.2-1B-Instruct": shape("LlamaForCausalLM", 16, 32, 8, 2048, 8192, 131072),
    "Llama-3.1-8B-Instruct": shape("LlamaForCausalLM", 32, 32, 8, 4096, 14336, 131072),
    "Llama-3.1-70B-Instruct": shape("LlamaForCausalLM", 80, 64, 8, 8192, 28672, 131072),
    "Qwen2.5-0.5B-Instruct": shape("Qwen2ForCausalLM", 24, 14, 2, 896, 4864, 32768),
    "Qwen2.5-7B-Instruct": shape("Qwen2ForCausalLM", 28, 28, 4, 3584, 18944, 32768),
    "Qwen3-0.6B": shape("Qwen3ForCausalLM", 28, 16, 8, 1024, 3072, 40960),
    "Qwen3-8B": shape("Qwen3ForCausalLM", 36, 32, 8, 4096, 12288, 40960),
}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONFIGS)))
def test_loads_and_is_valid(file: Path) -> None:
    text = file.read_text()
    needed = {key: value for key, value in STAND_INS.items() if file not in RECIPES}
    if "hf_path" in text:
        needed.pop("model.hf_path", None)
    config = load_config(file, [f"{key}={value}" for key, value in needed.items()])
    generates = config.recipe is Recipe.rl
    check_values(config, world_size=None, generates=generates)
    resolve_rewards(config.rewards)
    published = PUBLISHED.get(Path(config.model.hf_path).name)
    if "checkpoints/" in config.model.hf_path:
        assert published is not None, f"{config.model.hf_path} has no sizes in this test"
        check_model(config, published, generates=generates)
        check_values(config, world_size=16, generates=generates)  # the model's ranks also divide whole nodes


def test_recipes_are_named_after_their_files() -> None:
    assert [load_config(recipe).name for recipe in RECIPES] == [recipe.stem for recipe in RECIPES]


def test_the_presets_differ_as_their_papers_do() -> None:
    needed = [f"{key}={value}" for key, value in STAND_INS.items()]
    grpo = load_config(CONFIGS / "algorithms/grpo.yaml", needed).algorithm
    dr_grpo = load_config(CONFIGS / "algorithms/dr_grpo.yaml", needed).algorithm
    assert (grpo.advantage.normalize_by_std, dr_grpo.advantage.normalize_by_std) == (True, False)
    assert (grpo.aggregation, dr_grpo.aggregation) == (Aggregation.sequence_mean_token_mean, Aggregation.token_sum_norm)
    assert (grpo.kl.coefficient, dr_grpo.kl.coefficient) == (0.04, 0.0)

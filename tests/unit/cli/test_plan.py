"""`megatron-rl plan`, on configurations of published models and more ranks than any machine here has."""

import time
from pathlib import Path

import pytest

from megatron_rl.cli.main import main

PUBLISHED = Path(__file__).parents[2] / "published"
QWEN = ("qwen3_235b_a22b", dict(tensor=4, context=2, pipeline=8, expert=16, first=11, last=11, engine=8))
DEEPSEEK = ("deepseek_v3", dict(tensor=1, context=2, pipeline=16, expert=32, first=3, last=2, engine=32))
QWEN_256 = (QWEN[0], 256, QWEN[1])


def arguments(tmp_path: Path, model: str, ranks: int, sizes: dict[str, int], *more: str) -> list[str]:
    config = tmp_path / "plan.yaml"
    config.write_text(
        f"name: plan\nmodel: {{hf_path: {PUBLISHED / model}}}\ndata: {{train: t.jsonl}}\n"
        "rollout: {num_prompts_per_step: 128, num_samples_per_prompt: 16, gpu_memory_utilization: 0.8, "
        f"tensor_model_parallel_size: {sizes['engine']}, sampling: {{max_response_tokens: 8192}}}}\n"
        "rewards: {functions: [{name: exact_match}]}\ntrain: {micro_batch_tokens: 16384}\n"
        f"parallel: {{tensor_model_parallel_size: {sizes['tensor']}, sequence_parallel: {sizes['tensor'] > 1}, "
        f"pipeline_model_parallel_size: {sizes['pipeline']}, context_parallel_size: {sizes['context']}, "
        f"expert_model_parallel_size: {sizes['expert']}, expert_tensor_parallel_size: 1, "
        f"num_layers_in_first_pipeline_stage: {sizes['first']}, num_layers_in_last_pipeline_stage: {sizes['last']}}}\n"
    )
    return ["plan", str(config), *more, "--ranks", str(ranks)]


@pytest.mark.parametrize(
    ("case", "model"),
    [
        (QWEN, "235.09 B parameters, 22.19 B active"),
        (DEEPSEEK, "671.03 B parameters, 37."),
    ],
)
@pytest.mark.parametrize("ranks", [128, 1024])
def test_published_models(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    case: tuple[str, dict[str, int]],
    model: str,
    ranks: int,
) -> None:
    name, sizes = case
    if name == "deepseek_v3" and ranks == 128:
        sizes = sizes | dict(context=1, expert=8)
    begin = time.process_time()
    assert main(arguments(tmp_path, name, ranks, sizes)) == 0
    assert time.process_time() - begin < 10
    text = capsys.readouterr().out
    assert model in text
    tensor, context, pipeline = sizes["tensor"], sizes["context"], sizes["pipeline"]
    data = ranks // (tensor * context * pipeline)
    layout = f"{ranks} ranks = tensor {tensor} x context {context} x pipeline {pipeline} x data {data}; experts"
    assert layout in text
    assert f"stage {sizes['pipeline'] - 1} " in text


def test_what_cannot_be_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments(tmp_path, *QWEN_256), "--gpu-gigabytes", "16"]) == 2
    assert "GB on a rank of 16 GB; remedy: more expert_model_parallel_size" in capsys.readouterr().err
    assert main(arguments(tmp_path, QWEN[0], 100, QWEN[1])) == 2
    assert "for 100 ranks, allowed: a divisor of their number" in capsys.readouterr().err
    assert main(arguments(tmp_path, *QWEN_256, "parallel.num_layers_in_first_pipeline_stage=10")) == 2
    assert "which leave 73 of 94 layers to 6 stages" in capsys.readouterr().err

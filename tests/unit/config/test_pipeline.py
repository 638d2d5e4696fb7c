"""Layers of pipeline stages: literal cases, and Megatron's own count beside them."""

import re

import pytest
import torch
from megatron.core.transformer import TransformerConfig

import megatron_rl.device  # noqa: F401  (prepares Megatron-Core before any of it is imported)
from megatron_rl.config.errors import ConfigError
from megatron_rl.config.schema import ParallelConfig
from megatron_rl.config.world import layers_of_stages


def parallel(pp: int, chunks: int | None = None, first: int | None = None, last: int | None = None, **accounts: bool):
    return ParallelConfig(
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=chunks,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
        **{f"account_for_{name}_in_pipeline_split": value for name, value in accounts.items()},
    )


CASES = [
    (parallel(1), 5, [[5]]),
    (parallel(2), 6, [[3], [3]]),
    (parallel(2, 2), 8, [[2, 2], [2, 2]]),
    (parallel(3, first=1), 5, [[1], [2], [2]]),
    (parallel(3, first=1, last=2), 6, [[1], [3], [2]]),
    (parallel(2, first=2, last=4), 6, [[2], [4]]),
    (parallel(2, 2, first=2), 6, [[1, 1], [2, 2]]),
    (parallel(2, embedding=True), 5, [[2], [3]]),
    (parallel(2, 2, embedding=True, loss=True), 6, [[1, 2], [2, 1]]),
]


@pytest.mark.parametrize(("layout", "num_layers", "expected"), CASES)
def test_layers_of_stages(layout: ParallelConfig, num_layers: int, expected: list[list[int]]) -> None:
    assert layers_of_stages(layout, num_layers) == expected
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    config = TransformerConfig(
        num_layers=num_layers,
        hidden_size=8,
        num_attention_heads=1,
        pipeline_dtype=torch.float32,
        **{name: value for name, value in vars(layout).items() if name in TransformerConfig.__dataclass_fields__},
    )
    chunked = layout.virtual_pipeline_model_parallel_size is not None
    assert expected == [
        [get_num_layers_to_build(config, chunk if chunked else None, stage) for chunk in range(len(chunks))]
        for stage, chunks in enumerate(expected)
    ]


@pytest.mark.parametrize(
    ("layout", "num_layers", "message"),
    [
        (parallel(2), 5, "given 2, allowed: a divisor of the model's 5 layers"),
        (parallel(2, loss=True), 4, "a divisor of the model's 4 layers, counted as 5"),
        (parallel(2, 2), 6, "virtual_pipeline_model_parallel_size: given 2, allowed: a divisor of a stage's 3 layers"),
        (parallel(3, first=1), 6, "given 1 and None, which leave 5 of 6 layers to 2 stages"),
        (parallel(2, first=2, last=2), 6, "which leave 2 of 6 layers to 0 stages"),
        (parallel(1, first=2), 2, "given 2 and None"),
        (parallel(2, first=6), 6, "which leave 0 of 6 layers to 1 stages"),
        (parallel(2, first=1, loss=True), 3, "allowed: one of the two ways"),
        (parallel(2, embedding=True), 1, "at least one layer in every chunk"),
    ],
)
def test_what_cannot_be_split(layout: ParallelConfig, num_layers: int, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        layers_of_stages(layout, num_layers)

"""Scales are folded so that a layer computes what it did, from weights whose columns are scaled."""

import pytest
import torch
from torch import Tensor

from megatron_rl.weights.quantized.formats import fold_awq_scales

HIDDEN, FFN = 6, 4
LAYER = "decoder.layers.3"


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def parameters() -> dict[str, Tensor]:
    return {
        f"{LAYER}.input_layernorm.weight": 1 + 0.1 * draw(HIDDEN),
        f"{LAYER}.self_attention.linear_qkv.weight": draw(9, HIDDEN),
        f"{LAYER}.self_attention.linear_proj.weight": draw(HIDDEN, 5),
        f"{LAYER}.pre_mlp_layernorm.weight": 1 + 0.1 * draw(HIDDEN),
        f"{LAYER}.mlp.linear_fc1.weight": draw(2 * FFN, HIDDEN),
        f"{LAYER}.mlp.linear_fc2.weight": draw(HIDDEN, FFN),
    }


def computed(p: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """What the attention's input projection and a gated MLP give, each after its norm."""
    normed = torch.nn.functional.rms_norm(x, (HIDDEN,))
    qkv = (normed * p[f"{LAYER}.input_layernorm.weight"]) @ p[f"{LAYER}.self_attention.linear_qkv.weight"].t()
    fc1 = (normed * p[f"{LAYER}.pre_mlp_layernorm.weight"]) @ p[f"{LAYER}.mlp.linear_fc1.weight"].t()
    gate, up = fc1.chunk(2, dim=1)
    return qkv, (torch.nn.functional.silu(gate) * up) @ p[f"{LAYER}.mlp.linear_fc2.weight"].t()


SCALES = {
    f"{LAYER}.self_attention.linear_qkv": torch.linspace(0.5, 2.0, HIDDEN),
    f"{LAYER}.self_attention.linear_proj": torch.full((5,), 3.0),
    f"{LAYER}.mlp.linear_fc1": torch.linspace(2.0, 0.25, HIDDEN),
    f"{LAYER}.mlp.linear_fc2": torch.linspace(0.1, 4.0, FFN),
    "output_layer": torch.full((HIDDEN,), 2.0),
}


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("norms", [True, False])
def test_folding_changes_weights_and_not_what_they_compute(norms: bool, gated: bool) -> None:
    x, before, after = draw(7, HIDDEN), parameters(), parameters()
    fold_awq_scales(after, SCALES, norms=norms, gated=gated)
    for expected, found in zip(computed(before, x), computed(after, x), strict=True):
        torch.testing.assert_close(found, expected)
    changed = {name.removeprefix(f"{LAYER}.") for name in before if not torch.equal(before[name], after[name])}
    by_norms = {"input_layernorm.weight", "self_attention.linear_qkv.weight", "pre_mlp_layernorm.weight"}
    expected_changes = (by_norms if norms else set()) | ({"mlp.linear_fc2.weight"} if gated else set())
    assert changed == expected_changes | ({"mlp.linear_fc1.weight"} if norms or gated else set())


def test_the_columns_are_scaled_by_the_search_result() -> None:
    before, after = parameters(), parameters()
    fold_awq_scales(after, SCALES, norms=True, gated=True)
    name = f"{LAYER}.mlp.linear_fc2"
    torch.testing.assert_close(after[f"{name}.weight"], before[f"{name}.weight"] * SCALES[name])


def test_a_bias_that_would_be_scaled_too_keeps_its_layer_as_it_is() -> None:
    after = parameters() | {f"{LAYER}.mlp.linear_fc1.bias": draw(2 * FFN)}
    fold_awq_scales(after, SCALES, norms=False, gated=True)
    assert torch.equal(after[f"{LAYER}.mlp.linear_fc2.weight"], parameters()[f"{LAYER}.mlp.linear_fc2.weight"])

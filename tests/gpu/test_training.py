"""Training on a GPU follows the run of a machine without one: bfloat16, FP8, each library's Adam."""

from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config.schema import AdamImplementation, Dtype, Fp8Format, LayerSpec
from tests.gpu.conftest import needs
from tests.gpu.curve import curve, curve_of_the_host


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[float]:
    """The curve of float32 on the host."""
    return curve_of_the_host(checkpoint)


def test_float32_on_the_device_is_float32_on_the_host(checkpoint: Path, groups: Any, expected: list[float]) -> None:
    found = curve(checkpoint, groups, Dtype.float32, AdamImplementation.torch, layer_spec=LayerSpec.portable)
    # Sums in another order move a loss by 1e-7; 20 updates of Adam, whose first steps are signs, amplify that.
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("layers", "adam"),
    [
        (LayerSpec.portable, AdamImplementation.torch),
        pytest.param(LayerSpec.portable, AdamImplementation.apex, marks=needs("apex")),
        pytest.param(
            LayerSpec.transformer_engine, AdamImplementation.transformer_engine, marks=needs("transformer_engine")
        ),
    ],
)
def test_bfloat16_follows_float32(
    layers: LayerSpec, adam: AdamImplementation, checkpoint: Path, groups: Any, expected: list[float]
) -> None:
    found = curve(checkpoint, groups, Dtype.bfloat16, adam, layer_spec=layers)
    # Losses are means over some hundred tokens of log-probs with bfloat16's relative error of 2^-8; so are the updates.
    assert found == pytest.approx(expected, rel=0.03, abs=0.02)


@needs("transformer_engine")
@pytest.mark.parametrize("fp8_param", [False, True])
def test_fp8_learns(fp8_param: bool, checkpoint: Path, groups: Any, expected: list[float]) -> None:
    adam = AdamImplementation.transformer_engine
    found = curve(checkpoint, groups, Dtype.bfloat16, adam, fp8=Fp8Format.hybrid, fp8_param=fp8_param)
    assert found == pytest.approx(expected, rel=0.2, abs=0.1)  # 4 bits of mantissa instead of 8

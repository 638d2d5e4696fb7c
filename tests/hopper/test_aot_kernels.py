"""The head's Triton kernels, compiled for GPUs that are not here: every specialisation that a head launches."""

import pytest
import torch

pytest.importorskip("triton")

from tools.aot_kernels import CAPABILITIES, Variant, compile_variant, variants

_MOST_REGISTERS = 48
"""With 4 warps, 64 registers would halve the threads of an SM; the worst today is 47 (reduce, sm_100)."""


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("variant", variants(), ids=str)
def test_finding_1_kernels_compile_without_spills_and_with_wide_accesses(variant: Variant, capability: int) -> None:
    made = compile_variant(variant, capability)
    assert (made.spills, made.stack) == (0, 0)
    assert made.registers <= _MOST_REGISTERS
    # A row has numbers of its own: the label's column and logit and the statistics, or its gradient's factors.
    if variant.kernel == "reduce":
        assert made.narrow("LDG") == 2
        assert made.narrow("STG") == 3 + ("entropy" in variant.flags)
    else:
        assert made.narrow("LDG") == 4 + ("slope" in variant.flags)
        assert made.narrow("STG") == 0


def test_columns_that_are_not_aligned_are_seen() -> None:
    float32 = torch.float32
    aligned, odd = (compile_variant(Variant("gradient", float32, float32, (), columns), 90) for columns in (4736, 4737))
    assert aligned.narrow("STG") == 0 < odd.narrow("STG")
    assert "STG.128" not in odd.accesses

"""Compile the Triton kernels of the log-prob head for GPUs that this machine does not have, and print what came out.

The path is the JIT's own: the functions that launch the kernels are called, with a driver that names a target and
launches nothing. So the specialisations are those of a launch on CUDA: dtypes, and divisibility by 16 of pointers,
strides and sizes. ptxas, cuobjdump and nvdisasm are in the triton wheel.

    python -m tools.aot_kernels            the table of docs/gpu.md
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from megatron_rl.parallel import triton_kernels

CAPABILITIES = (90, 100)
"""Hopper, Blackwell."""
_ROWS, _COLUMNS = 32, 4736
"""Of a tile: a multiple of 128 columns, as `TileShape` gives on CUDA."""
_BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Variant:
    """One specialisation that a head launches."""

    kernel: str
    """'reduce' or 'gradient'."""
    read: torch.dtype
    written: torch.dtype
    flags: tuple[str, ...] = ()
    """'entropy' and 'keep' of reduce; 'slope' and 'exponentials' of gradient."""
    columns: int = _COLUMNS

    def __str__(self) -> str:
        names = [str(dtype).removeprefix("torch.") for dtype in (self.read, self.written)]
        dtypes = names[0] if self.kernel == "reduce" or names[0] == names[1] else " -> ".join(names)
        return ", ".join([self.kernel, dtypes, *self.flags])

    def launch(self) -> None:
        """Call the function that launches the kernel; on an interpreter's or a fake driver's terms."""
        x = torch.empty(_ROWS, self.columns, dtype=self.read)
        out = torch.empty(_ROWS, self.columns, dtype=self.written)
        column = torch.zeros(_ROWS, dtype=torch.int64)
        if self.kernel == "reduce":
            kept = out if "keep" in self.flags else None
            triton_kernels.reduce_tile(x, column, temperature=0.7, entropy="entropy" in self.flags, out=kept)
            return
        shift, offset, slope, at_label = torch.empty(4, _ROWS).unbind()
        triton_kernels.gradient(
            x,
            column,
            shift,
            offset,
            slope if "slope" in self.flags else None,
            at_label,
            inverse_temperature=1.0,
            exponentials="exponentials" in self.flags,
            out=out,
        )


def variants() -> list[Variant]:
    """All that the heads launch.

    The fused heads' tiles are float32, their gradients float32 or bfloat16 (`product_dtype`); `vocab_parallel` reduces
    logits of any dtype that the kernels take, and forms their gradient in that dtype or in float32.
    """
    float32, bfloat16, float16 = torch.float32, torch.bfloat16, torch.float16
    found = [Variant("reduce", x, x, flags) for x in (float32, bfloat16, float16) for flags in ((), ("entropy",))]
    found.append(Variant("reduce", float32, float32, ("entropy", "keep")))
    pairs = [(float32, float32), (float32, bfloat16), (bfloat16, float32), (bfloat16, bfloat16)]
    pairs += [(float16, float32), (float16, float16)]
    found += [Variant("gradient", *pair, flags) for pair in pairs for flags in ((), ("slope",))]
    of_tokens = ("slope", "exponentials")  # of what reduce has kept, which is float32
    return found + [Variant("gradient", *pair, of_tokens[keep:]) for pair in pairs[:2] for keep in (0, 1)]


@dataclass(frozen=True)
class Compiled:
    """What ptxas made of a variant."""

    registers: int
    stack: int
    """Bytes of a thread's stack: spilled registers and local arrays."""
    spills: int
    """Loads and stores of local memory in the machine code."""
    shared: int
    """Bytes of shared memory of a program."""
    accesses: dict[str, int]
    """Global loads and stores by width, for example 'LDG.128': 4."""

    def narrow(self, name: str) -> int:
        """Loads (LDG) or stores (STG) of less than 128 bits: those of one number per row, where columns are aligned."""
        return sum(count for key, count in self.accesses.items() if key.startswith(name) and not key.endswith(".128"))


class _Target:
    """A driver that launches nothing."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


@contextmanager
def target(capability: int) -> Iterator[list[Any]]:
    """Kernels launched in here are compiled for the capability, and put into the list."""
    kernels = [triton_kernels._reduce_kernel, triton_kernels._gradient_kernel]
    compiled: list[Any] = []

    def compiling(kernel: Any) -> Any:
        run = kernel.run
        return lambda *args, **kwargs: compiled.append(run(*args, **(kwargs | {"warmup": True})))

    before = driver._active
    driver.set_active(_Target(capability))  # type: ignore[arg-type]
    try:
        for kernel in kernels:
            kernel.run = compiling(kernel)
        yield compiled
    finally:
        for kernel in kernels:
            del kernel.run
            kernel.device_caches.clear()
        driver._active = before


def compile_variant(variant: Variant, capability: int) -> Compiled:
    """Compile one variant.

    Raises:
        triton.CompilationError: it cannot be.
    """
    with target(capability) as compiled:
        variant.launch()
    (kernel,) = compiled
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    return read_machine_code(usage, code)


def read_machine_code(usage: str, code: str) -> Compiled:
    """From the output of `cuobjdump -res-usage` and `nvdisasm -c`."""
    accesses: dict[str, int] = {}
    for name, qualifiers in re.findall(r"\b(LDG|STG)\.([A-Z0-9.]+)", code):
        width = next((part for part in qualifiers.split(".") if re.fullmatch(r"128|64|[US]?(8|16)", part)), "32")
        key = f"{name}.{width}"
        accesses[key] = accesses.get(key, 0) + 1
    return Compiled(
        registers=_number(r"REG:(\d+)", usage),
        stack=_number(r"STACK:(\d+)", usage),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        shared=_number(r"SHARED:(\d+)", usage),
        accesses=accesses,
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, f"no {pattern} in the output of cuobjdump: {text}"
    return int(found[1])


def _run(binary: str, *arguments: str) -> str:
    return subprocess.run([str(_BINARIES / binary), *arguments], check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Print the table."""
    print("| kernel | sm | registers | spills | stack | shared, B | loads and stores |")
    print("|---|---|---|---|---|---|---|")
    for capability in CAPABILITIES:
        for variant in variants():
            made = compile_variant(variant, capability)
            accesses = ", ".join(f"{count} x {key}" for key, count in sorted(made.accesses.items()))
            numbers = (capability, made.registers, made.spills, made.stack, made.shared)
            print(f"| {variant} | {' | '.join(map(str, numbers))} | {accesses} |")


if __name__ == "__main__":
    main()

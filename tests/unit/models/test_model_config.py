"""config.json against transformers: every key of every family left out in turn, and random pairs of sources."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from megatron_rl.config.errors import UserError
from megatron_rl.models.families import check_family, family_of
from megatron_rl.models.families.decoder import rope_parameters
from megatron_rl.models.model_config import resolved_config
from tests.checkpoints import _SHAPE, FAMILIES


def make_config(name: str) -> dict[str, Any]:
    """config.json of a family's tiny checkpoint."""
    fields = {**_SHAPE, **FAMILIES[name]}
    model_type = fields.pop("model_type")
    config = AutoConfig.for_model(model_type, **fields).to_dict()
    return {**config, "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]}


def _meaning(hf: dict[str, Any]) -> Any:
    """All that the model is built from."""
    family = family_of(hf)
    names = [(m.name, sorted(m.hf_shapes.items())) for m in family.tensor_maps(hf)]
    return family.transformer_fields(hf), family.gpt_fields(hf), rope_parameters(hf), names


def _or_refusal(hf: dict[str, Any]) -> Any:
    try:
        check_family(hf)
        return _meaning(hf)
    except UserError as error:
        return error


def _transformers(hf: dict[str, Any], folder: Path) -> dict[str, Any]:
    """config.json with everything written out that transformers takes where it is silent."""
    (folder / "config.json").write_text(json.dumps(hf))
    loaded = AutoConfig.from_pretrained(folder)
    return {**loaded.to_dict(), "architectures": hf["architectures"]}


_CASES = [(name, key) for name in FAMILIES for key in make_config(name) if key not in ("architectures", "model_type")]


@pytest.mark.parametrize(("name", "key"), _CASES)
def test_a_silent_key_means_what_it_means_to_transformers(name: str, key: str, tmp_path: Path) -> None:
    hf = make_config(name)
    del hf[key]
    ours = _or_refusal(hf)
    if isinstance(ours, UserError):
        # Without n_group there are groups by default, and the refusal is about their use.
        assert key in str(ours) or "missing" in str(ours) or key == "n_group", ours
        return
    assert ours == _meaning(_transformers(hf, tmp_path))


@pytest.mark.parametrize("name", list(FAMILIES))
def test_resolving_twice_changes_nothing(name: str) -> None:
    once = resolved_config(make_config(name))
    assert resolved_config(once) == once


_ROPES = (
    {"rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "default", "rope_theta": 50000.0},
    {"rope_type": "linear", "factor": 4.0},
    {"type": "linear", "factor": 4.0},
    {"rope_type": "linear", "factor": 4.0, "rope_theta": 50000.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "type": "linear", "factor": 4.0},
    None,
)


@pytest.mark.parametrize("theta", [None, 10000.0, 50000.0])
@pytest.mark.parametrize("scaling", _ROPES)
@pytest.mark.parametrize("parameters", _ROPES)
def test_two_sources_of_rotary_parameters(parameters: Any, scaling: Any, theta: float | None, tmp_path: Path) -> None:
    """What is taken is what transformers takes; what is refused says two things."""
    hf = {k: v for k, v in make_config("qwen2").items() if not k.startswith("rope_")}
    said = {"rope_parameters": parameters, "rope_scaling": scaling, "rope_theta": theta}
    hf |= {key: value for key, value in said.items() if value is not None}
    ours: Any
    try:
        ours = rope_parameters(hf)
    except UserError as error:
        ours = str(error)
    if isinstance(ours, str):
        assert "two things" in ours
        assert sum(value is not None for value in said.values()) > 1 or "type" in (scaling or parameters)
        return
    theirs = {k: v for k, v in _transformers(hf, tmp_path)["rope_parameters"].items() if k != "type"}
    assert {k: v for k, v in ours.items() if v is not None} == theirs


@pytest.mark.parametrize(
    "fields",
    [
        {"num_experts": 4, "num_local_experts": 8},
        {"dtype": "float32", "torch_dtype": "bfloat16"},
        {"model_type": "llama"},
        {"layer_types": ["sliding_attention", "full_attention"]},
        {"layer_types": ["full_attention"]},
        {"rope_theta": 5.0},
        {"partial_rotary_factor": 0.5, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}},
    ],
)
def test_a_contradiction_is_refused_with_both_sources(fields: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="two things") as raised:
        check_family(make_config("qwen3_moe") | fields)
    assert all(key in str(raised.value) for key in fields)

"""Whether a run that goes on is the run of its folder: its configuration against the config.yaml that is there.

Another recipe, objective or model is another run, and is refused: it would take up weights, moments and a place in the
data that mean something else. Changed data, rewards, sizes and seeds may be meant; they are said in one line.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_rl.checkpoint.folders import latest_step
from megatron_rl.config.errors import UserError, shown
from megatron_rl.config.load import plain_values
from megatron_rl.config.schema import Config
from megatron_rl.runs.directory import RunDirectory

_IDENTITY = (
    "recipe",
    "algorithm.policy_loss.name",
    "algorithm.advantage.estimator",
    "algorithm.preference.loss",
    "rewards.model.kind",
)
"""Keys that make a run what it is."""
_SAID = (
    *("data", "seed", "rewards", "rollout.num_prompts_per_step", "rollout.num_samples_per_prompt"),
    *("train.global_batch_size", "train.num_epochs_per_step", "model.hf_path"),
)
"""Keys, or their beginnings, whose change moves the place in the data or what is learned from it."""
_BYTES = 1 << 20


def changes(run: RunDirectory, config: Config) -> str | None:
    """A line that lists what has changed since the run's latest start; None: nothing, or it has no checkpoint.

    Raises:
        UserError: it is another run.
    """
    if not run.config_file.is_file() or not _has_checkpoint(run):
        return None
    try:
        before = _flat(yaml.safe_load(run.config_file.read_text(encoding="utf-8")) or {})
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError) as error:
        raise UserError(f"{run.config_file}: not readable, so nobody can say which run this is: {error}") from error
    now = _flat(plain_values(config))
    for key in _IDENTITY:
        if key in before and before[key] != now[key]:
            raise UserError(
                f"{key}: given {shown(now[key])}, but the run in {run.path} has {shown(before[key])}; "
                "allowed: the same, or another name for this run"
            )
    keys = [
        key
        for key in sorted(now)
        if key in before and before[key] != now[key] and any(key == s or key.startswith(f"{s}.") for s in _SAID)
    ]
    if not keys:
        return None
    told = ", ".join(f"{key} was {shown(before[key])} and is {shown(now[key])}" for key in keys)
    return f"{run.path}: the run goes on with a changed configuration: {told}"


def file_identity(file: str | Path | None) -> str:
    """Size and a hash of both ends of a data file, so that a place in it means something; '' without one."""
    if file is None or not Path(file).is_file():
        return ""
    size = Path(file).stat().st_size
    with open(file, "rb") as stream:
        digest = hashlib.sha256(stream.read(_BYTES))
        stream.seek(max(0, size - _BYTES))
        digest.update(stream.read(_BYTES))
    return f"{size}-{digest.hexdigest()[:16]}"


def _has_checkpoint(run: RunDirectory) -> bool:
    try:
        return latest_step(run.checkpoints_dir) is not None
    except (UserError, OSError):  # a damaged name of the latest; which one is taken is said where it is read
        return True


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key; lists are values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat

"""What is in a checkpoint, and how a run takes it up again: as if it had never stopped.

    model, optimizer, scheduler   of every trained model by its name; of `policy` without a prefix, so that its tensors
                                  are those of any Megatron checkpoint of the model
    rng_state                     see `random_state`
    run_state                     the trainer's own, of plain Python values, equal on all ranks
    layout                        of the ranks that saved it. Only generators care: all tensors are stored whole

How it is written is said in `writer`, how its folder looks in `folders`, how damage is found in `integrity`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

from megatron_rl.checkpoint import optimizer_state, random_state
from megatron_rl.checkpoint.folders import CheckpointError, iteration_folder
from megatron_rl.checkpoint.integrity import check_files, loading
from megatron_rl.engine.optimizer import Optimizer
from megatron_rl.engine.policy import Policy

POLICY = "policy"


@dataclass(frozen=True)
class Trained:
    """A model with the optimizer that trains it."""

    model: Policy
    optimizer: Optimizer

    def sharded(self) -> dict[str, Any]:
        """Core's description of every tensor of the model, by chunk."""
        return {str(number): chunk.sharded_state_dict() for number, chunk in enumerate(self.model.models)}


Models = Mapping[str, Trained]
"""By name; one is called `POLICY`."""


def to_save(models: Models, run_state: dict[str, Any]) -> dict[str, Any]:
    """The whole state for core to write; collective. The run's own is equal on all ranks: core writes rank 0's."""
    state: dict[str, Any] = {
        "rng_state": random_state.to_save(),
        "layout": _layout(models),
        "run_state": run_state,
        "schedulers": {name: trained.optimizer.scheduler.state_dict() for name, trained in models.items()},
    }
    for name, trained in models.items():
        model = trained.sharded()
        of_model = {"model": model, "optimizer": optimizer_state.tensors_to_save(trained.optimizer, model)}
        state |= _named(name, of_model)
    return state


@torch.no_grad()
def load(checkpoints: Path, step: int, models: Models) -> dict[str, Any]:
    """Restore the state after `step` steps and return its `run_state`; collective over all ranks.

    Raises:
        CheckpointError: files are missing or damaged, or it is no run's checkpoint, or of a run with other models.
    """
    folder = iteration_folder(checkpoints, step)
    check_files(folder)
    with loading(folder):
        common = dist_checkpointing.load_common_state_dict(str(folder))
    layout = common.get("layout")
    if layout is None:
        raise CheckpointError(f"{folder} holds a model without training state; a run cannot be resumed from it")
    saved = sorted(common["schedulers"])
    if saved != sorted(models):
        raise CheckpointError(f"{folder} holds the state of {', '.join(saved)}; this run trains {', '.join(models)}")
    same_layout = layout == _layout(models)
    template: dict[str, Any] = {
        "rng_state": random_state.to_load(saved_world_size=layout["world"], same_layout=same_layout)
    }
    model_states = {name: trained.sharded() for name, trained in models.items()}
    for name, trained in models.items():
        needed = optimizer_state.tensors_to_load(trained.optimizer, model_states[name])
        # Sharded anew: a prefix changes the entries in place, and `restore` finds its parameters by them.
        template |= _named(name, {"model": trained.sharded(), "optimizer": needed})
    with loading(folder):
        # Core's check of the template wants every tensor read by its main replica; here a rank reads what it steps.
        state = dist_checkpointing.load(template, str(folder), validate_access_integrity=False)
    for name, trained in models.items():
        loaded = state if name == POLICY else state[name]
        for number, chunk in enumerate(trained.model.models):
            chunk.load_state_dict(loaded["model"][str(number)])
        optimizer_state.restore(trained.optimizer, model_states[name], loaded["optimizer"])
        trained.optimizer.resume_schedule(state["schedulers"][name])
    random_state.restore(state["rng_state"], same_layout=same_layout)
    run_state: dict[str, Any] = state["run_state"]
    return run_state


def _named(name: str, state: dict[str, Any]) -> dict[str, Any]:
    if name == POLICY:
        return state
    add_prefix_for_sharding(state, f"{name}.")
    return {name: state}


def _layout(models: Models) -> dict[str, int]:
    groups = models[POLICY].model.groups
    sizes = {name: getattr(groups, name).size() for name in ("tp", "cp", "pp", "dp", "ep", "etp")}
    return {**sizes, "world": dist.get_world_size()}

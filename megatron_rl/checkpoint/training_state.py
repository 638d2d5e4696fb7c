"""Training state on disk: everything that a resumed run needs to go on as if it had never stopped.

Megatron's layout: `checkpoints/iter_0000010/` in torch_dist format and `latest_checkpointed_iteration.txt`. A
checkpoint is written under a temporary name and renamed when it is complete, then named as the latest; so the latest
is always whole, whenever the run is killed.
"""

import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.models.gpt import GPTModel

from megatron_rl.checkpoint.integrity import CheckpointError, check_files, loading
from megatron_rl.device import HAS_CUDA
from megatron_rl.engine.optimizer import Optimizer
from megatron_rl.engine.policy import Policy

LATEST = "latest_checkpointed_iteration.txt"


def iteration_folder(checkpoints: Path, step: int) -> Path:
    """Where the state after `step` steps lies."""
    return checkpoints / f"iter_{step:07d}"


def latest_step(checkpoints: Path) -> int | None:
    """Step of the latest complete checkpoint, or None.

    Raises:
        CheckpointError: the tracker file is damaged, or names a checkpoint that is not there.
    """
    tracker = checkpoints / LATEST
    if not tracker.exists():
        return None
    text = tracker.read_text().strip()
    if not text.isdigit():
        raise CheckpointError(f"{tracker}: expected a step number, got '{text[:40]}'")
    step = int(text)
    if not (iteration_folder(checkpoints, step) / "metadata.json").exists():
        raise CheckpointError(f"{tracker} names step {step}, but {iteration_folder(checkpoints, step)} is missing")
    return step


def _rng_state() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if HAS_CUDA else None,
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if HAS_CUDA:
        torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])


def _layout(policy: Policy) -> dict[str, int]:
    return {name: getattr(policy.groups, name).size() for name in ("tp", "pp", "dp")}


def _torch_adams(optimizer: Optimizer) -> list[torch.optim.Optimizer]:
    """The optimizers inside core's that are torch's own, which stands in where no fused one is installed."""
    chained = getattr(optimizer.megatron, "chained_optimizers", [optimizer.megatron])
    return [one.optimizer for one in chained if isinstance(one.optimizer, torch.optim.Adam | torch.optim.AdamW)]


def _optimizer_format(optimizer: Optimizer) -> dict[str, str]:
    # Core's default format cannot be read back for torch's AdamW.
    kind = "dp_reshardable" if _torch_adams(optimizer) else "fully_reshardable"
    return {"distrib_optim_sharding_type": kind}


def _allocate_moments(optimizer: Optimizer) -> None:
    """Give torch's AdamW the state that it allocates at its first step; core reads it before, when a run resumes."""
    for adam in _torch_adams(optimizer):
        for parameter in (p for group in adam.param_groups for p in group["params"]):
            if not adam.state[parameter]:
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                adam.state[parameter] = {"step": torch.tensor(0.0), **moments}


def _complete_steps(state: dict[str, Any]) -> None:
    """Give loaded moments the count that core leaves out where it is 0 and the optimizer is not distributed."""
    inner = state.get("optimizer", state).get("state", {})
    if "common_step" not in inner:
        for moments in inner.values():
            moments["step"] = torch.tensor(0.0)


def _restore_steps(optimizer: Optimizer) -> None:
    """Give every parameter of torch's AdamW its own count of steps, on which the bias correction depends.

    Core restores the count to the parameter groups; the parameters keep that of a fresh optimizer, or share a tensor
    that each of them would then increment.
    """
    for adam in _torch_adams(optimizer):
        for group in adam.param_groups:
            of_group = group.pop("step", None)
            for state in (adam.state[parameter] for parameter in group["params"]):
                state["step"] = torch.tensor(float(state.get("step", 0.0) if of_group is None else of_group))


def _chunks(policy: Policy) -> dict[str, GPTModel]:
    """This rank's models under Megatron's keys: `model`, or `model0`, `model1` ... for a stage of several chunks."""
    models = policy.models
    return {f"model{i}" if len(models) > 1 else "model": gpt for i, gpt in enumerate(models)}


def _state(policy: Policy, optimizer: Optimizer, *, is_loading: bool) -> dict[str, Any]:
    _allocate_moments(optimizer)
    model = {key: gpt.sharded_state_dict() for key, gpt in _chunks(policy).items()}
    kind = _optimizer_format(optimizer)
    rank = ShardedObject("rng_state", _rng_state(), (dist.get_world_size(),), (dist.get_rank(),), replica_id=0)
    return {
        **model,
        "optimizer": optimizer.megatron.sharded_state_dict(
            model if len(model) > 1 else model["model"], is_loading=is_loading, metadata=kind
        ),
        "rng_state": rank,
    }


def save(
    checkpoints: Path,
    step: int,
    policy: Policy,
    optimizer: Optimizer,
    run_state: dict[str, Any],
    *,
    keep_last: int | None,
) -> None:
    """Write the state after `step` steps; collective over all ranks.

    Args:
        run_state: the trainer's own state, equal on all ranks, of plain Python values.
        keep_last: of this checkpoint and those of earlier steps, all but this many newest ones are deleted.
    """
    final = iteration_folder(checkpoints, step)
    partial = checkpoints / f".{final.name}.partial"
    if dist.get_rank() == 0:
        for left_behind in checkpoints.glob(".iter_*.partial"):
            shutil.rmtree(left_behind)
        partial.mkdir(parents=True)
    dist.barrier()
    state = _state(policy, optimizer, is_loading=False)
    state |= {"scheduler": optimizer.scheduler.state_dict(), "layout": _layout(policy), "run_state": run_state}
    dist_checkpointing.save(state, str(partial), content_metadata=_optimizer_format(optimizer))
    if dist.get_rank() == 0:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        _write_atomically(checkpoints / LATEST, f"{step}\n")
        delete_old(checkpoints, step, keep_last)
    dist.barrier()


@torch.no_grad()
def load(checkpoints: Path, step: int, policy: Policy, optimizer: Optimizer) -> dict[str, Any]:
    """Restore the state after `step` steps and return its `run_state`; collective over all ranks.

    Raises:
        CheckpointError: files are missing or damaged, or the layout is another one than the checkpoint's.
    """
    folder = iteration_folder(checkpoints, step)
    check_files(folder)
    with loading(folder):
        saved_layout = dist_checkpointing.load_common_state_dict(str(folder)).get("layout")
    if saved_layout is None:
        raise CheckpointError(f"{folder} holds a model without training state; a run cannot be resumed from it")
    if saved_layout != _layout(policy):
        raise CheckpointError(
            f"{folder} was saved at the layout {saved_layout}, this run has {_layout(policy)}; "
            "resume at the same layout, or export it and start a new run from the export"
        )
    template = _state(policy, optimizer, is_loading=True)
    with loading(folder):
        state = dist_checkpointing.load(template, str(folder))
    for key, gpt in _chunks(policy).items():
        gpt.load_state_dict(state[key])
    _complete_steps(state["optimizer"])
    optimizer.megatron.load_state_dict(state["optimizer"])
    _restore_steps(optimizer)
    optimizer.resume_schedule(state["scheduler"])
    _set_rng_state(state["rng_state"])
    run_state: dict[str, Any] = state["run_state"]
    return run_state


def _write_atomically(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.partial")
    temporary.write_text(text)
    os.replace(temporary, file)


def delete_old(checkpoints: Path, step: int, keep_last: int | None) -> None:
    """Delete all but the `keep_last` newest checkpoints of up to `step` steps; None: delete nothing.

    Later ones are there if the run was set back. They must not push out what it writes now.
    """
    written = [folder for folder in sorted(checkpoints.glob("iter_*")) if folder <= iteration_folder(checkpoints, step)]
    if keep_last is not None:
        for folder in written[:-keep_last]:
            shutil.rmtree(folder)

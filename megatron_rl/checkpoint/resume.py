"""From which checkpoint a run goes on: the latest that is whole.

The ranks look at the files of a candidate together, each at its share, and decide together. A damaged checkpoint is
named and passed over for the one before it; its step will be made, and written, again.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_rl.checkpoint.folders import CheckpointError, iteration_folder, latest_step, steps_on_disk
from megatron_rl.checkpoint.integrity import check_digests, check_files
from megatron_rl.checkpoint.training_state import Models, load


def resume(checkpoints: Path, models: Models, *, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Restore the latest whole checkpoint and return its `run_state`; None if there is none. Collective.

    Args:
        say: told on rank 0 of every checkpoint that is passed over, and why.

    Raises:
        CheckpointError: there are checkpoints and none is whole, or it is of another kind of run.
    """
    candidates: list[Any] = [_candidates(checkpoints) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(candidates, src=0)
    steps, problem = candidates[0]
    if problem is not None and dist.get_rank() == 0:
        say(problem)
    for step in steps:
        problem = _problem(iteration_folder(checkpoints, step))
        if problem is None:
            return load(checkpoints, step, models)
        if dist.get_rank() == 0:
            say(f"{problem}; going back to an earlier checkpoint")
    if steps or problem is not None:
        raise CheckpointError(f"{checkpoints}: no whole checkpoint is left: {problem}")
    return None


def _candidates(checkpoints: Path) -> tuple[list[int], str | None]:
    """Steps to try, the one that is named as the latest first; and what is wrong with that name.

    Where the name is of no use, all are tried. Steps after a latest one that was named on purpose are not.
    """
    try:
        latest = latest_step(checkpoints)
    except (CheckpointError, OSError) as error:
        return steps_on_disk(checkpoints)[::-1], str(error)
    return [step for step in reversed(steps_on_disk(checkpoints)) if latest is None or step <= latest], None


def _problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint, the same on all ranks; None if it is whole."""
    mine = None
    try:
        check_files(folder)
        check_digests(folder, part=dist.get_rank(), num_parts=dist.get_world_size())
    except CheckpointError as error:
        mine = str(error)
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, mine)
    return next((problem for problem in problems if problem is not None), None)

"""Reference answers that a reward cannot use, found before anything is generated."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_rl.data.files import DataError
from megatron_rl.data.samples import Prompt
from megatron_rl.rewards.answers import only_number
from megatron_rl.rewards.instructions import instructions_fault
from megatron_rl.rewards.mathematics.reward import reference_fault
from megatron_rl.rewards.scoring import BoundReward


def check_references(prompts: Sequence[Prompt], rewards: Sequence[BoundReward], *, tolerated: float) -> None:
    """Check the references of a data file against the rewards that read them.

    Args:
        tolerated: share of the rows whose reference `math_answer` need not be able to read; their verdict is unknown.

    Raises:
        DataError: names the first such row, the reward, and how many there are.
    """
    for reward in rewards:
        if reward.name not in _FAULTS:
            continue
        fault_of = _FAULTS[reward.name]
        arguments = getattr(reward.call, "arguments", {})
        faults = [(prompt, fault) for prompt in prompts if (fault := fault_of(prompt, arguments)) is not None]
        allowed = tolerated if reward.name == "math_answer" else 0.0
        if len(faults) > allowed * len(prompts):
            prompt, fault = faults[0]
            raise DataError(
                f"{prompt.source}: reward {reward.name!r}: {fault}; {len(faults)} of {len(prompts)} rows are like this"
                + (f", rewards.unreadable_references allows {allowed:g}" if reward.name == "math_answer" else "")
            )


_NO_ANSWER = "the row has no reference answer (data.answer_key)"


def _no_number(prompt: Prompt, arguments: Mapping[str, Any]) -> str | None:
    if prompt.answer is None:
        return _NO_ANSWER
    if only_number(prompt.answer) is None:
        return f"the reference answer {prompt.answer!r} does not hold exactly one number; math_answer reads others"
    return None


_FAULTS: dict[str, Callable[[Prompt, Mapping[str, Any]], str | None]] = {
    "numeric_answer": _no_number,
    "math_answer": lambda prompt, arguments: reference_fault(prompt.answer, arguments),
    "exact_match": lambda prompt, arguments: None if prompt.answer is not None else _NO_ANSWER,
    "instructions": lambda prompt, arguments: instructions_fault(prompt.row),
}

"""Who waits for whom: what each rank said last, put together.

Every rank writes where it is into `logs/ranks/rank_N.json` (see `watchdog`). From these alone follows which ranks are
silent, which wait, and for whom; a run that hangs says it itself, and `megatron-rl doctor` says it of a run that is
dead. Nothing here imports torch.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from megatron_rl.trainer.run_directory import write_atomically


@dataclass(frozen=True)
class RankState:
    """Where a rank is."""

    rank: int
    pid: int
    host: str
    time: float
    """When it said so, seconds since the epoch; a rank that is stopped, or whose node is gone, says nothing more."""
    step: int
    """The step it is making."""
    phase: str
    phase_since: float
    place: str
    """'function (file:line)'; of a rank that waits, the collective and who called it."""
    waits: bool
    """Whether it is inside a collective."""
    place_since: float
    collectives: int
    """How many it has entered so far."""
    heartbeat_seconds: float
    """How often it says so."""
    ended: str | None = None
    """How it ended; null while it runs."""

    def silent_for(self, now: float) -> float:
        """Seconds of silence beyond what is usual; 0 if it is not silent."""
        silence = now - self.time
        return silence if self.ended is None and silence > 3 * self.heartbeat_seconds + 1 else 0.0


def write_state(folder: Path, state: RankState) -> None:
    """Write a rank's state for the others."""
    write_atomically(folder / f"rank_{state.rank}.json", json.dumps(asdict(state)) + "\n")


def read_states(folder: Path) -> list[RankState]:
    """The states of all ranks that have written one, by rank; damaged ones are left out."""
    names = {field.name for field in fields(RankState)}
    states = []
    for file in folder.glob("rank_*.json"):
        try:
            values = json.loads(file.read_text())
            states.append(RankState(**{name: values[name] for name in names}))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return sorted(states, key=lambda state: state.rank)


def verdict(states: Sequence[RankState], *, now: float | None = None) -> str:
    """One line: which ranks wait for which, in what.

    In the order of certainty: ranks that are silent; ranks that wait in no collective; ranks that have entered fewer
    collectives than others; ranks that wait in different places.
    """
    now = time.time() if now is None else now
    running = [state for state in states if state.ended is None]
    if not running:
        return "no rank is running"
    silent = [state for state in running if state.silent_for(now)]
    waiting = [state for state in running if state.waits and state not in silent]
    busy = [state for state in running if not state.waits and state not in silent]
    fewest, most = min(s.collectives for s in running), max(s.collectives for s in running)
    if silent:
        first = silent[0]
        what = (
            f"{_ranks(silent)} silent for {first.silent_for(now):.0f} s (process {first.pid} on {first.host}, "
            f"last in {_where(first)}): stopped, dead, or its node is gone"
        )
        culprits = silent
    elif waiting and busy:
        what = f"{_ranks(busy)} in {_where(busy[0])} for {now - busy[0].phase_since:.0f} s"
        culprits = busy
    elif not waiting:
        longest = max(busy, key=lambda state: now - state.phase_since)
        return f"{_ranks([longest])} in {_where(longest)} for {now - longest.phase_since:.0f} s, over its limit"
    elif fewest < most and len({state.place for state in waiting}) > 1:
        culprits = [state for state in waiting if state.collectives == fewest]
        what = f"{_ranks(culprits)} in another collective, {_where(culprits[0])}"
    elif len({state.place for state in waiting}) > 1:
        culprits = [state for state in waiting if state.place != waiting[0].place]
        what = f"{_ranks(culprits)} in another collective, {_where(culprits[0])}"
    else:
        hosts = ", ".join(sorted({state.host for state in waiting}))
        return f"all ranks wait in {_where(waiting[0])}, and none is missing: suspect the network between {hosts}"
    rest = [state for state in waiting if state not in culprits]
    return f"{what}; {_ranks(rest, verb=('waits', 'wait'))} for it in {_where(rest[0])}" if rest else what


def _where(state: RankState) -> str:
    return f"{state.phase} of step {state.step}: {state.place}"


def _ranks(states: Sequence[RankState], verb: tuple[str, str] = ("is", "are")) -> str:
    """'rank 1 is', 'ranks 0, 2, 3 are', 'ranks 0, 1, 2, ... (512) are'."""
    numbers = [str(state.rank) for state in states]
    shown = ", ".join(numbers) if len(numbers) <= 8 else f"{', '.join(numbers[:3])}, ... ({len(numbers)})"
    return f"rank {shown} {verb[0]}" if len(numbers) == 1 else f"ranks {shown} {verb[1]}"

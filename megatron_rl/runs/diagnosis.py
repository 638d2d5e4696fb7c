"""What happened to a run, from its folder alone: for one that is dead or hangs, on any machine, without torch.

Every rank writes where it is into `logs/ranks/rank_N.json` (see `watchdog`). From these alone follows which ranks are
silent, which wait, and for whom: the hang report. A run that hangs writes it itself, and `megatron-rl doctor` gives it
for a run that is dead (`diagnosis`).
"""

import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from megatron_rl.config.load import load_config
from megatron_rl.runs.directory import RunDirectory, write_atomically
from megatron_rl.runs.logs import read_metrics


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


def hang_report(states: Sequence[RankState], *, now: float | None = None) -> str:
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
        waited_for = silent
    elif waiting and busy:
        what = f"{_ranks(busy)} in {_where(busy[0])} for {now - busy[0].phase_since:.0f} s"
        waited_for = busy
    elif not waiting:
        longest = max(busy, key=lambda state: now - state.phase_since)
        return f"{_ranks([longest])} in {_where(longest)} for {now - longest.phase_since:.0f} s, over its limit"
    elif fewest < most and len({state.place for state in waiting}) > 1:
        waited_for = [state for state in waiting if state.collectives == fewest]
        what = f"{_ranks(waited_for)} in another collective, {_where(waited_for[0])}"
    elif len({state.place for state in waiting}) > 1:
        waited_for = [state for state in waiting if state.place != waiting[0].place]
        what = f"{_ranks(waited_for)} in another collective, {_where(waited_for[0])}"
    else:
        hosts = ", ".join(sorted({state.host for state in waiting}))
        return f"all ranks wait in {_where(waiting[0])}, and none is missing: suspect the network between {hosts}"
    rest = [state for state in waiting if state not in waited_for]
    return f"{what}; {_ranks(rest, verb=('waits', 'wait'))} for it in {_where(rest[0])}" if rest else what


def _where(state: RankState) -> str:
    return f"{state.phase} of step {state.step}: {state.place}"


def _ranks(states: Sequence[RankState], verb: tuple[str, str] = ("is", "are")) -> str:
    """'rank 1 is', 'ranks 0, 2, 3 are', 'ranks 0, 1, 2, ... (512) are'."""
    numbers = [str(state.rank) for state in states]
    shown = ", ".join(numbers) if len(numbers) <= 8 else f"{', '.join(numbers[:3])}, ... ({len(numbers)})"
    return f"rank {shown} {verb[0]}" if len(numbers) == 1 else f"ranks {shown} {verb[1]}"


_SHOWN_RANKS = 8
_LATEST = "latest_checkpointed_iteration.txt"


def diagnosis(run: RunDirectory, *, now: float | None = None) -> list[str]:
    """Lines about a run: how far it came, how its ranks ended or where they are, what its logs say last, what to do."""
    now = time.time() if now is None else now
    num_steps = load_config(run.config_file).train.num_steps if run.config_file.exists() else None
    rows = read_metrics(run.metrics_file) if run.metrics_file.exists() else []
    step = int(rows[-1]["step"]) if rows else 0
    states = read_states(run.ranks_dir)
    condition = _condition(run, states, finished=num_steps is not None and step >= num_steps, now=now)
    lines = [
        f"run         {run.path}",
        f"progress    step {step} of {num_steps if num_steps is not None else '?'}"
        + (f", {_age(now - run.metrics_file.stat().st_mtime)} ago" if rows else ", no row of metrics"),
        f"checkpoint  {_checkpoint(run)}",
        f"condition   {condition}",
    ]
    lines += [f"rank {state.rank:<6} {_rank(state, now)}" for state in _worth_showing(states, now)]
    lines += _last_words(run)
    return lines


def _condition(run: RunDirectory, states: Sequence[RankState], *, finished: bool, now: float) -> str:
    alarm = run.hang_dir / "hang_report.txt"
    failed = [state for state in states if state.ended not in (None, "done")]
    told = [state for state in failed if str(state.ended).startswith("Interrupted")]
    if alarm.exists():
        return f"hung, and was ended: {alarm.read_text().strip()}"
    if told:
        return f"told to stop, and saved ({told[0].ended}); the same command goes on"
    if failed:
        first = min(failed, key=lambda state: state.time)
        return f"failed: rank {first.rank} first, with {str(first.ended)[:300]}; the same command goes on"
    if not states:
        return "has not started, or its logs are gone"
    if all(state.ended == "done" for state in states):
        return "finished" if finished else "ended"
    if all(state.silent_for(now) or not _is_alive(state) for state in states if state.ended is None):
        last = max(state.time for state in states)
        return f"dead: no rank has said anything for {_age(now - last)}, and none said why; the same command goes on"
    silent = [state for state in states if state.silent_for(now) or not _is_alive(state)]
    if silent:
        return f"hanging: {hang_report(states, now=now)}"
    return f"running: {hang_report(states, now=now).removesuffix(', over its limit')}"


def _is_alive(state: RankState) -> bool:
    """Whether its process exists, as far as can be told from here."""
    return state.host != socket.gethostname() or os.path.exists(f"/proc/{state.pid}")


def _worth_showing(states: Sequence[RankState], now: float) -> Sequence[RankState]:
    """The ranks that differ from the others, or the first ones."""
    if len(states) <= _SHOWN_RANKS:
        return states
    places = [state.place for state in states]
    odd = [s for s in states if s.silent_for(now) or s.ended not in (None, "done") or places.count(s.place) == 1]
    return (odd or states)[:_SHOWN_RANKS]


def _rank(state: RankState, now: float) -> str:
    where = f"{state.host}, process {state.pid}, {state.phase} of step {state.step}"
    if state.ended is not None:
        return f"{where}: {state.ended[:200]}"
    return f"{where}: {state.place or 'starting'}, {_age(now - state.time)} ago"


def _checkpoint(run: RunDirectory) -> str:
    tracker = run.checkpoints_dir / _LATEST
    steps = sorted(folder.name for folder in run.checkpoints_dir.glob("iter_*"))
    partial = [folder.name for folder in run.checkpoints_dir.glob(".iter_*.partial")]
    latest = f"step {tracker.read_text().strip()}" if tracker.exists() else "none"
    cut = f"; {', '.join(partial)} was cut short, and is cleared away by the next save" if partial else ""
    return f"{latest}, of {len(steps)} on disk{cut}"


def _last_words(run: RunDirectory) -> Iterator[str]:
    """The last line of each log that ends in an error."""
    logs = [*run.logs_dir.glob("rank_*.log"), *run.logs_dir.glob("*/attempt_*/rank_*.log"), *run.logs_dir.glob("*.out")]
    for log in sorted(logs, key=lambda file: file.stat().st_mtime)[-_SHOWN_RANKS:]:
        lines = _tail(log).splitlines()
        if lines and ("Error" in lines[-1] or "error" in lines[-1] or "megatron-rl:" in lines[-1]):
            yield f"log         {log}: {lines[-1][:300]}"


def _tail(file: Path) -> str:
    with file.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - 4096))
        return stream.read().decode(errors="replace").rstrip()


def _age(seconds: float) -> str:
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{max(0.0, seconds):.0f} s"

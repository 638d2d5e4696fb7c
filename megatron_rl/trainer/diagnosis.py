"""What happened to a run, from its folder alone: for one that is dead or hangs, on any machine, without torch."""

import os
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_rl.config.load import load_config
from megatron_rl.trainer.metrics_log import read_metrics
from megatron_rl.trainer.run_directory import RunDirectory
from megatron_rl.trainer.verdict import RankState, read_states, verdict

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
    alarm = run.hang_dir / "verdict.txt"
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
        return f"hanging: {verdict(states, now=now)}"
    return f"running: {verdict(states, now=now).removesuffix(', over its limit')}"


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

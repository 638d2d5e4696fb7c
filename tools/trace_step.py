"""How much of the package a GRPO step runs through: the files and functions that one rank enters.

    python -m tools.trace_step [key=value ...]

Trains configs/recipes/quickstart_grpo.yaml for two steps on one rank with a colocated vLLM engine, on a new random
model, and traces the second step from drawing prompts to the end of the weight synchronisation; what only a first step
enters does not count. Counted are functions with a name, in the main thread; lines are those of the files.
"""

import argparse
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

REPOSITORY = Path(__file__).parents[1]
RECIPE = REPOSITORY / "configs/recipes/quickstart_grpo.yaml"
MODEL = ["--hidden-size", "128", "--num-layers", "2", "--intermediate-size", "96", "--num-sft", "1"]


class Trace:
    """Functions of a package that are entered between two of them."""

    def __init__(self, package: Path, *, first: CodeType, last: CodeType, skip: int) -> None:
        """Args:
        package: its folder.
        first: of the function whose call begins the trace.
        last: of the function whose return ends it.
        skip: calls of `first` that begin nothing.
        """
        self._root, self._first, self._last, self._skip = f"{package}{os.sep}", first, last, skip
        self._is_on = self._is_over = False
        self._entered: set[CodeType] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, this thread's calls are seen."""
        sys.setprofile(self._see)
        try:
            yield
        finally:
            sys.setprofile(None)

    def _see(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and not self._is_over:
            if code is self._first:
                self._is_on = self._is_on or self._skip == 0
                self._skip -= 1
            if self._is_on:
                self._entered.add(code)
        elif event == "return" and code is self._last and self._is_on:
            self._is_on, self._is_over = False, True

    @property
    def functions(self) -> dict[str, int]:
        """Number of functions that were entered, by the path of their file in the package."""
        assert self._is_over, "the trace did not come to its end"
        # Lambdas, comprehensions and modules have no name of their own.
        names = {
            (code.co_filename.removeprefix(self._root), code.co_qualname, code.co_firstlineno)
            for code in self._entered
            if code.co_filename.startswith(self._root) and not code.co_name.startswith("<")
        }
        return dict(sorted(Counter(file for file, _, _ in names).items()))


@dataclass(frozen=True)
class Figure:
    """Files with their lines, and functions of them that were entered."""

    files: int
    lines: int
    functions: int


def figures(package: Path, functions: dict[str, int]) -> tuple[dict[str, Figure], dict[str, Figure]]:
    """By file and by room, the first folder of a path; the root's files are the room ''."""
    of_files = {
        file: Figure(1, len((package / file).read_text().splitlines()), count) for file, count in functions.items()
    }
    rooms: dict[str, Figure] = {}
    for file, figure in of_files.items():
        room = _room(file)
        rooms[room] = _sum([rooms.get(room, Figure(0, 0, 0)), figure])
    return of_files, rooms


def _room(file: str) -> str:
    return file.split(os.sep)[0] if os.sep in file else ""


def _sum(of: Sequence[Figure]) -> Figure:
    return Figure(sum(f.files for f in of), sum(f.lines for f in of), sum(f.functions for f in of))


def table(of_files: dict[str, Figure], rooms: dict[str, Figure]) -> str:
    """Rooms, each with its files, and the totals."""
    lines = [f"{'':40}{'files':>7}{'lines':>7}{'functions':>11}"]
    for room, figure in rooms.items():
        lines.append(f"{room + '/':40}{figure.files:7}{figure.lines:7}{figure.functions:11}")
        inside = [
            (file, f) for file, f in of_files.items() if (file.split(os.sep)[0] if os.sep in file else "") == room
        ]
        lines += [f"  {file:38}{'':7}{f.lines:7}{f.functions:11}" for file, f in inside]
    total = _sum(list(rooms.values()))
    return "\n".join([*lines, f"{'total':40}{total.files:7}{total.lines:7}{total.functions:11}"])


def trace_run(folder: Path, overrides: Sequence[str]) -> dict[str, int]:
    """Train in a folder of its own, in this process, and trace the second step."""
    from megatron_rl.cli.main import main as megatron_rl
    from megatron_rl.trainer.rl import RLTrainer
    from tools.make_arithmetic import main as make_arithmetic

    make_arithmetic([str(folder), *MODEL])
    trace = Trace(
        REPOSITORY / "megatron_rl",
        first=RLTrainer.generate.__code__,
        last=RLTrainer.sync_weights.__code__,
        skip=1,
    )
    settings = {
        "output_dir": folder / "runs",
        "model.hf_path": folder / "model",
        "data.train": folder / "train.jsonl",
        "data.eval": "null",
        "parallel.tensor_model_parallel_size": 1,
        "rollout.tensor_model_parallel_size": 1,
        "rollout.num_prompts_per_step": 4,
        "rollout.kv_cache_gigabytes": 0.02,
        "train.num_steps": 2,
        "evaluation.interval": 0,
        "checkpoint.export_hf": "false",
    }
    with trace.watching():
        code = megatron_rl(["train", str(RECIPE), *(f"{key}={value}" for key, value in settings.items()), *overrides])
    assert code == 0, f"the run ended with {code}"
    return trace.functions


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Files and functions that a GRPO step enters on one rank.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        functions = trace_run(Path(folder), arguments.overrides)
    print(table(*figures(REPOSITORY / "megatron_rl", functions)))


if __name__ == "__main__":
    main()

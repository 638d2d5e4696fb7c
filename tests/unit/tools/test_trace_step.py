"""The counting of tools/trace_step.py, on a package of three files."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from tools.trace_step import Figure, Trace, figures, table

FILES = {
    "__init__.py": "",
    "loop.py": "from traced import leaf\nfrom traced.room.part import Part\n\n\ndef begin():\n    Part().twice()\n\n\n"
    "def end():\n    leaf.used()\n\n\ndef after():\n    leaf.unused()\n",
    "leaf.py": "def used():\n    return [x for x in (lambda: (1,))()]\n\n\ndef unused():\n    pass\n",
    "room/__init__.py": "",
    "room/part.py": "class Part:\n    def twice(self):\n        self.once()\n        self.once()\n\n    def once(self):"
    "\n        pass\n",
}


@pytest.fixture
def loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name, text in FILES.items():
        file = tmp_path / "traced" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("traced.loop")
    for name in [name for name in sys.modules if name.partition(".")[0] == "traced"]:
        del sys.modules[name]


def trace_of(loop: Any, *, skip: int, steps: int) -> Trace:
    trace = Trace(Path(loop.__file__).parent, first=loop.begin.__code__, last=loop.end.__code__, skip=skip)
    with trace.watching():
        for _ in range(steps):
            loop.begin()
            loop.end()
            loop.after()
    return trace


@pytest.mark.parametrize("skip", [0, 1])
def test_functions_between_first_and_last_count_once(loop: Any, skip: int) -> None:
    """Not `after` and `unused`, and neither the lambda nor the comprehension."""
    trace = trace_of(loop, skip=skip, steps=3)
    assert trace.functions == {"leaf.py": 1, "loop.py": 2, "room/part.py": 2}


def test_a_skipped_step_leaves_nothing(loop: Any) -> None:
    with pytest.raises(AssertionError, match="did not come to its end"):
        _ = trace_of(loop, skip=1, steps=1).functions


def test_figures_are_by_file_and_by_room(loop: Any) -> None:
    of_files, rooms = figures(Path(loop.__file__).parent, trace_of(loop, skip=0, steps=1).functions)
    assert of_files == {"leaf.py": Figure(1, 6, 1), "loop.py": Figure(1, 14, 2), "room/part.py": Figure(1, 7, 2)}
    assert rooms == {"": Figure(2, 20, 3), "room": Figure(1, 7, 2)}
    assert table(of_files, rooms).splitlines()[-1].split() == ["total", "3", "27", "5"]

"""The program of docs/own_megatron_loop.md, taken from the page's code blocks."""

import importlib.util
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "own_megatron_loop.md"


def source() -> str:
    """The page's code blocks, in their order."""
    return "\n\n".join(re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL))


def run_in_rank(rank: int, file: Path, arguments: list[str]) -> Any:
    """Run the program that was written to `file`; what its `main` returns."""
    spec = importlib.util.spec_from_file_location("own_megatron_loop", file)
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program.main(arguments)

"""The public API is what docs/api.md lists, with these signatures: what the program of a loop of one's own uses."""

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

from tests.distributed.own_loop import source

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
RETURNED = {
    "megatron_rl.data.packing.MicroBatch",
    "megatron_rl.models.families.Family",
    "megatron_rl.parallel.groups.Groups",
}
"""What the program does not import but gets from what it does, and uses."""
_ROW = re.compile(r"^\| `(?P<call>(?P<name>[\w.]+)(?:\(.*\))?)` \|", flags=re.MULTILINE)


def documented() -> dict[str, str]:
    """Dotted name -> how it is called, as the page has them. A heading names the module of the rows below it."""
    found = {}
    for section in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]:
        module = section.partition("\n")[0].strip("`")
        found |= {f"{module}.{row['name']}": row["call"] for row in _ROW.finditer(section)}
    return found


def imported() -> set[str]:
    """Dotted names that the program takes from this package."""
    return {
        f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(source()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron_rl")
        for alias in node.names
    }


def found_in_the_package(dotted: str) -> Any:
    """The object of a dotted name: of a module, or of a class in one."""
    parts = dotted.split(".")
    for split in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for name in parts[split:]:
            owner, found = found, inspect.getattr_static(found, name)
        return found.__get__(None, owner) if isinstance(found, staticmethod | classmethod) else found
    raise AssertionError(f"{dotted} cannot be imported")


def call_of(dotted: str) -> str:
    """How it is called: names, order, kinds and defaults of the parameters; a property has none."""
    found = found_in_the_package(dotted)
    module, _, name = dotted.rpartition(".")
    if module.rpartition(".")[2][0].isupper():
        name = f"{module.rpartition('.')[2]}.{name}"
    if isinstance(found, property):
        return name
    parameters = [
        _shown(parameter.replace(annotation=parameter.empty))
        for parameter in inspect.signature(found).parameters.values()
        if parameter.name != "self"
    ]
    signature = inspect.Signature(parameters)
    return f"{name}{signature}"


class _Elided:
    """Stands for a default that is not a literal."""

    def __repr__(self) -> str:
        return "..."


def _shown(parameter: inspect.Parameter) -> inspect.Parameter:
    is_literal = parameter.default is None or isinstance(parameter.default, str | int | float)
    if parameter.default is parameter.empty or is_literal:
        return parameter
    return parameter.replace(default=_Elided())


def test_the_page_has_the_package_as_it_is() -> None:
    page = documented()
    assert page == {name: call_of(name) for name in page}


def test_the_page_has_all_that_the_program_imports_or_gets_and_nothing_else() -> None:
    top = {name for name in documented() if not name.rpartition(".")[0].rpartition(".")[2][0].isupper()}
    assert top == imported() | RETURNED


def test_the_program_needs_neither_the_engine_nor_the_trainer() -> None:
    rooms = {name.split(".")[1] for name in imported()}
    assert rooms.isdisjoint({"config", "engine", "trainer", "cli", "runs", "objectives", "sync"})

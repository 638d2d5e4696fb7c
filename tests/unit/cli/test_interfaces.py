"""What is called of other libraries is looked up in those that are installed, and what is not there is said."""

import subprocess
import sys

import pytest

from megatron_rl.cli import doctor
from megatron_rl.cli.doctor import Call, imported_names


def test_the_source_is_read() -> None:
    names = imported_names()
    assert ("vllm.sampling_params", "RequestOutputKind") in names
    assert ("megatron.core.optimizer", "get_megatron_optimizer") in names


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (Call("json:dumps", ("obj", "indent")), None),
        (Call("json:JSONEncoder.encode", ("o",)), None),
        (Call("json:JSONEncoder.encode", ("o", "speed")), "json:JSONEncoder.encode takes no speed"),
        (Call("json:JSONEncoder.shout", ()), "json:JSONEncoder.shout: there is no shout"),
        (Call("json.nowhere:dumps", ()), "json.nowhere: cannot be imported: No module named 'json.nowhere'"),
        (
            Call("megatron_rl.cli.doctor:Call", ("where", "whence")),
            "megatron_rl.cli.doctor:Call takes no whence",
        ),
    ],
)
def test_calls(call: Call, problem: str | None) -> None:
    assert doctor._call(call)() == problem


def test_imports_and_texts() -> None:
    names = {("json", "dumps"), ("json", "decoder"), ("json", "shout"), ("no_such_library", "x")}
    assert [check() for check in doctor._imports(names)] == [None, None, "json has no shout"]
    wanted = {"json/decoder.py": ("class JSONDecoder", "class Shout"), "json": ("JSONDecodeError",), "absent/x": ("y",)}
    assert [check() for check in doctor._texts(wanted)] == [None, "json/decoder.py has no class Shout", None]


def test_the_installed_releases_have_what_is_called() -> None:
    """In a process of its own: it imports vLLM."""
    command = [sys.executable, "-m", "megatron_rl", "doctor", "--interfaces"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stdout[-3000:]
    assert ended.stdout.splitlines()[-1].endswith("interfaces looked up, 0 of them are not as this package calls them")

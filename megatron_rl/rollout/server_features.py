"""What the installed vLLM's server has, seen in its files: importing vLLM would cost seconds and side effects.

    vLLM     door of token ids                         versions of weights on completions
    0.24     always open                               none: a completion bears the version at its submission
    0.32     opened by --enable-scale-out              named by /update_weight_version, told for every span of tokens

At its submission a request cannot be older than the version that makes its first token, so without vLLM's word a
completion never looks fresher than it is.
"""

import importlib.util
from functools import cache
from pathlib import Path


@cache
def _entrypoints() -> Path | None:
    spec = importlib.util.find_spec("vllm")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "entrypoints"


def opens_token_door_on_request() -> bool:
    """Whether `/inference/v1/generate` needs `--enable-scale-out`, which servers that always have it do not know."""
    folder = _entrypoints()
    return folder is not None and (folder / "scale_out").is_dir()


def names_weight_versions() -> bool:
    """Whether the server can be told the version of its weights, and says it of every completion."""
    return _has_route("update_weight_version")


@cache
def _has_route(name: str) -> bool:
    folder = _entrypoints()
    return folder is not None and any(f'"/{name}"' in file.read_text() for file in folder.rglob("api_router.py"))

"""What a server of an installed vLLM has is seen in its files: here in miniatures of the releases that were read."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_rl.rollout import server_features


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> None:
    for name, text in {"__init__.py": "", **files}.items():
        file = folder / "vllm" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.setattr(server_features, "_entrypoints", lambda: folder / "vllm/entrypoints")


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    server_features._has_route.cache_clear()
    yield
    server_features._has_route.cache_clear()


ROUTES = "entrypoints/serve/dev/rlhf/api_router.py"


def test_a_server_whose_door_is_always_open_and_that_names_no_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, {ROUTES: '@router.post("/pause")', "entrypoints/serve/disagg/api_router.py": ""})
    assert not server_features.opens_token_door_on_request()
    assert not server_features.names_weight_versions()


def test_a_server_that_opens_the_door_on_request_and_names_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, {ROUTES: '@router.post("/update_weight_version")', "entrypoints/scale_out/x.py": ""})
    assert server_features.opens_token_door_on_request()
    assert server_features.names_weight_versions()

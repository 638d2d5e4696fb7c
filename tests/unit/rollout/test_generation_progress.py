"""How a rank follows a server that generates: by the server's own count of tokens, if it keeps one."""

import itertools
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.rollout import remote
from megatron_rl.rollout.address import EngineLost
from megatron_rl.rollout.remote import RemoteEngine

LOOKS = 20


class Address:
    """A server that answers with these metrics in turn, and has finished its request at the last look, if ever."""

    host, port = "engine", 1

    def __init__(self, metrics: list[str], request: "Future[Any]", *, finishes: bool) -> None:
        self._metrics, self._request, self._finishes = itertools.cycle(metrics), request, finishes
        self._looks = 0

    def get_text(self, path: str, *, timeout_seconds: float) -> str:
        self._looks += 1
        if self._finishes and self._looks == LOOKS:
            self._request.set_result(None)
        text = next(self._metrics)
        if not text:
            raise EngineLost("no answer")
        return text


class Server:
    """Of that address."""

    def __init__(self, address: Address) -> None:
        self.address = address


def told(monkeypatch: pytest.MonkeyPatch, *metrics: str, finishes: bool = True) -> list[int]:
    """What is told of a request on the way; a server that stands still is lost at once."""
    monkeypatch.setattr(remote, "_LOOK_SECONDS", 0.01)
    request: Future[Any] = Future()
    server: Any = Server(Address(list(metrics), request, finishes=finishes))
    engine = RemoteEngine(server, folder=Path(), decode=str, max_model_len=8, stall_seconds=0.0)
    progress: list[int] = []
    engine._watch([request], progress.append)
    return progress


def count(tokens: int) -> str:
    return f'# TYPE x counter\nvllm:generation_tokens_total{{engine="0",model_name="m"}} {float(tokens)}\n'


def test_tokens_are_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(monkeypatch, count(1), count(2)) == [0] * LOOKS + [1]


def test_a_server_that_keeps_no_count_is_not_taken_for_one_that_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(monkeypatch, "python_gc_objects_collected_total 1.0\n") == [0] * LOOKS + [1]


def test_a_server_that_generates_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineLost, match=r"^engine at engine port 1: no token in \d+ s, with 1 requests unfinished$"):
        told(monkeypatch, count(5), finishes=False)


def test_answers_may_be_missing_now_and_then_but_not_three_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(monkeypatch, count(1), "", "", count(2), "", "")[-1] == 1
    with pytest.raises(EngineLost, match="no answer"):
        told(monkeypatch, "", finishes=False)

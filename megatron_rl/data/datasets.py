"""Prompts for RL and sequences for training, from data files and from scored completions; and the order of rows.

    file --load_prompts--> Prompt            file --load_sft--> TrainingSequence
    Sample --training_sequence--> TrainingSequence

Prompt and response are always tokenised apart and their ids joined, in SFT as in RL, so that the border between them
is a token border and a response is trained after exactly the prompt tokens that it is generated after.

`DataOrder` is a pure function of how many rows have been drawn since the run's start. That one integer is a run's place
in its data, and a resumed run continues with exactly the rows that an uninterrupted one would have drawn, also with
another batch size.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_rl.config.schema import DataConfig
from megatron_rl.data.chat import render_prompts, tokenize
from megatron_rl.data.files import DataError, read_rows, require
from megatron_rl.data.samples import Prompt, Sample, TrainingSequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_prompts(
    path: str | Path, data: DataConfig, tokenizer: "PreTrainedTokenizerBase", *, max_prompt_tokens: int
) -> list[Prompt]:
    """Every row of a file as a tokenised prompt; prompt_id is the row's number, from 0.

    A row without `data.answer_key` has answer None; a number is turned into its text.

    Raises:
        DataError: naming file and line: a missing key, an empty prompt, one of more than max_prompt_tokens tokens.
    """
    numbered = list(read_rows(path, data.format))
    sources = [source for source, _ in numbered]
    prompts = [require(row, data.prompt_key, source) for source, row in numbered]
    loaded = []
    for prompt_id, (text, ids) in enumerate(render_prompts(prompts, sources, data, tokenizer)):
        source, row = numbered[prompt_id]
        if not ids:
            raise DataError(f"{source}: the prompt has no tokens")
        if len(ids) > max_prompt_tokens:
            raise DataError(
                f"{source}: the prompt has {len(ids)} tokens, data.max_prompt_tokens is {max_prompt_tokens}"
            )
        answer = _answer(row.get(data.answer_key), data.answer_key, source)
        loaded.append(Prompt(prompt_id, tuple(ids), text, answer, source, row))
    return loaded


def load_sft(
    path: str | Path, data: DataConfig, tokenizer: "PreTrainedTokenizerBase", *, max_tokens: int
) -> list[TrainingSequence]:
    """Every row of a file as prompt + response + end-of-sequence token; loss on the last two alone.

    A response that ends in the end-of-sequence token already gets no second one.

    Raises:
        DataError: naming file and line: a missing key, an empty prompt or response, more than max_tokens tokens in
            all; or a tokenizer without an end-of-sequence token.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError("the tokenizer has no end-of-sequence token, which SFT must teach")
    numbered = list(read_rows(path, data.format))
    sources = [source for source, _ in numbered]
    prompts = [require(row, data.prompt_key, source) for source, row in numbered]
    responses = [_response(row, data.response_key, source) for source, row in numbered]
    rendered = render_prompts(prompts, sources, data, tokenizer)
    sequences = []
    for source, (_, prompt_ids), ids in zip(sources, rendered, tokenize(responses, tokenizer), strict=True):
        if not prompt_ids:
            raise DataError(f"{source}: the prompt has no tokens")
        response_ids = ids if ids[-1:] == [eos] else [*ids, eos]
        num_tokens = len(prompt_ids) + len(response_ids)
        if num_tokens > max_tokens:
            raise DataError(
                f"{source}: prompt and response have {len(prompt_ids)} + {len(response_ids)} = {num_tokens} tokens, "
                f"at most {max_tokens} are allowed"
            )
        token_ids = np.array([*prompt_ids, *response_ids], dtype=np.int64)
        sequences.append(TrainingSequence(token_ids, _response_mask(len(prompt_ids), len(response_ids))))
    return sequences


def training_sequence(sample: Sample) -> TrainingSequence:
    """Prompt + completion as sampled, with loss on every completion token, the end-of-sequence token included.

    `per_token` holds the engine's `rollout_log_probs`, [L] float32, 0 on the prompt, and the sample's `token_rewards`
    if it has any. Advantages come later: they need the other samples of the group.
    """
    prompt_ids, completion = sample.prompt.token_ids, sample.completion
    assert prompt_ids, f"{sample.prompt.source}: a prompt without tokens predicts nothing"
    assert completion.token_ids, f"{sample.prompt.source}: a completion without tokens has nothing to train on"
    assert len(completion.log_probs) == len(completion.token_ids), f"{sample.prompt.source}: one log-prob per token"
    loss_mask = _response_mask(len(prompt_ids), len(completion.token_ids))
    rollout_log_probs = np.zeros_like(loss_mask)
    rollout_log_probs[len(prompt_ids) - 1 :] = completion.log_probs
    token_ids = np.array(prompt_ids + completion.token_ids, dtype=np.int64)
    per_token = {"rollout_log_probs": rollout_log_probs}
    if sample.token_rewards is not None:
        per_token["token_rewards"] = np.zeros_like(loss_mask)
        per_token["token_rewards"][len(prompt_ids) - 1 :] = sample.token_rewards
    return TrainingSequence(token_ids, loss_mask, per_token)


def _response_mask(num_prompt_tokens: int, num_response_tokens: int) -> "np.ndarray[Any, np.dtype[np.float32]]":
    """[L], L = prompt + response - 1: entry t is about token t + 1, so the response begins at num_prompt_tokens - 1."""
    mask = np.zeros(num_prompt_tokens + num_response_tokens - 1, dtype=np.float32)
    mask[num_prompt_tokens - 1 :] = 1.0
    return mask


def _answer(value: Any, key: str, source: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{source}: {key!r} is {value}, no reference; a row without one leaves the key out")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"{source}: {key!r} must be a string or a number, this is {type(value).__name__}")


def _response(row: dict[str, Any], key: str, source: str) -> str:
    response = require(row, key, source)
    if not isinstance(response, str) or not response:
        what = "empty" if response == "" else type(response).__name__
        raise DataError(f"{source}: {key!r} must be a string that is not empty, this is {what}")
    return response


@dataclass(frozen=True)
class DataOrder:
    """Epoch after epoch over `num_rows` rows, each in an order of its own drawn from (seed, epoch).

    Args:
        num_rows: rows of the dataset, at least 1.
        seed: of the run, not negative.
        shuffle: False keeps the file's order in every epoch.
    """

    num_rows: int
    seed: int
    shuffle: bool

    def __post_init__(self) -> None:
        if self.num_rows < 1:
            raise DataError(f"a dataset must have at least one row, this one has {self.num_rows}")
        if self.seed < 0:
            raise DataError(f"seed: {self.seed} is given, it must not be negative")

    def rows(self, position: int, count: int) -> list[int]:
        """Row numbers of the `count` draws from the position-th on (both in rows); may straddle epochs."""
        assert min(position, count) >= 0, (position, count)
        drawn: list[int] = []
        while len(drawn) < count:
            epoch, start = divmod(position + len(drawn), self.num_rows)
            stop = min(start + count - len(drawn), self.num_rows)
            drawn.extend(_epoch(self.num_rows, self.seed, epoch)[start:stop] if self.shuffle else range(start, stop))
        return drawn


@lru_cache(maxsize=2)
def _epoch(num_rows: int, seed: int, epoch: int) -> list[int]:
    """The permutation of one epoch: rows sorted by a 64-bit random key each.

    NumPy keeps the raw streams of SeedSequence and PCG64 the same in all versions, which it does not promise for
    `Generator.permutation` (NEP 19): an order must not change when a run is resumed under a newer NumPy.
    """
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(num_rows)
    permutation: list[int] = np.argsort(keys, kind="stable").tolist()
    return permutation

"""How completions are drawn, and what each one's noise depends on."""

import hashlib
from dataclasses import dataclass

from megatron_rl.config.errors import UserError

_MIN_TEMPERATURE, _MAX_TEMPERATURE = 0.01, 2.0
"""vLLM's range. Below it vLLM samples at 0.01, which would no longer be the temperature that training divides by."""


class RolloutError(UserError):
    """A prompt, sampling parameter or engine argument that cannot be used."""


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn."""

    temperature: float = 1.0
    """Divides the logits; 0 is greedy."""
    top_p: float = 1.0
    """Nucleus: the smallest set of tokens with at least this probability is sampled from."""
    max_response_tokens: int = 256
    """Completions are cut here."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion. Their tokens stay in it."""

    def __post_init__(self) -> None:
        if self.temperature != 0 and not _MIN_TEMPERATURE <= self.temperature <= _MAX_TEMPERATURE:
            allowed = f"0 or in [{_MIN_TEMPERATURE}, {_MAX_TEMPERATURE}]"
            raise RolloutError(f"sampling.temperature is {self.temperature}; it may be {allowed}")
        if not 0 < self.top_p <= 1:
            raise RolloutError(f"sampling.top_p is {self.top_p}; it may be in (0, 1]")
        if self.max_response_tokens < 1:
            raise RolloutError(f"sampling.max_response_tokens is {self.max_response_tokens}; it must be at least 1")
        if not all(self.stop):
            raise RolloutError("sampling.stop has an empty string")


def sample_seed(seed: int, sample: int) -> int:
    """Seed of sample number `sample` of a prompt with `seed`, in [0, 2^63).

    A hash, because seed + sample would give prompts of neighbouring seeds the same noise.
    """
    digest = hashlib.blake2b(f"{seed}:{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1

"""Sizes of a model, and what follows from them by arithmetic: parameters, floating-point operations, bytes.

Operations are those of matrix products, two per multiply-add. A token in a pass forward and backward costs

    6 x (parameters of the matrices that it meets)  +  6 x heads x (key channels + value channels) x (keys that it sees)

per model and per layer: one product forward, two backward. The embedding is looked up and costs nothing; the output
layer costs its parameters also where it shares them with the embedding; of the experts a token meets `topk`. A packed
sequence sees itself alone, so a row of sequences costs less than one sequence of its length. Recomputation is not
counted: it is work of the machine and not of the model. Source: Kaplan et al. 2020, arXiv:2001.08361, section 2.1;
Chowdhery et al. 2022, arXiv:2204.02311, appendix B (MFU).
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerSizes:
    """Parameters of one layer: whole, and on one rank of a tensor-parallel and an expert-tensor-parallel size."""

    dense: int
    """All but the routed experts."""
    dense_matrices: int
    """Those of them that are in matrices."""
    dense_on_rank: int
    expert: int = 0
    """One routed expert; 0: the layer has none."""
    expert_on_rank: int = 0
    window: int | None = None
    """Keys that a token sees, itself among them; None: all before it."""


@dataclass(frozen=True)
class ModelSizes:
    """A decoder."""

    layers: tuple[LayerSizes, ...]
    embedding: int
    embedding_on_rank: int
    final_norm: int
    output: int
    """0: the output layer is the embedding."""
    output_on_rank: int
    hidden: int
    heads: int
    key_channels: int
    """Of one head."""
    value_channels: int
    """Of one head."""
    kv_heads: int
    cached: int
    """Elements that a token leaves in the key-value cache of a layer, all heads together."""
    cache_is_latent: bool
    """Every tensor-parallel rank of an engine keeps all of them."""
    ffn: int
    """Inner channels of a dense layer; of a gated one, counted once."""
    gated: bool
    rms_norm: bool = True
    """Its norms are RMSNorms, else LayerNorms."""
    query_key_norm: bool = False
    """Queries and keys have norms of their own."""
    num_experts: int = 0
    topk: int = 0
    """Routed experts of a token."""
    expert_ffn: int = 0
    shared_ffn: int = 0
    """Inner channels of the experts that see every token."""

    @property
    def parameters(self) -> int:
        """All of the model."""
        of_layers = sum(layer.dense + self.num_experts * layer.expert for layer in self.layers)
        return self.embedding + of_layers + self.final_norm + self.output

    @property
    def active_matrices(self) -> int:
        """Parameters of the matrices that one token meets, the output layer's among them."""
        of_layers = sum(layer.dense_matrices + self.topk * layer.expert for layer in self.layers)
        return of_layers + (self.output or self.embedding)

    def training_flops(self, lengths: Iterable[int]) -> int:
        """Operations of a pass forward and backward over sequences of these lengths."""
        total = 0
        pair = 6 * self.heads * (self.key_channels + self.value_channels)
        windows: dict[int | None, int] = {}
        for layer in self.layers:
            windows[layer.window] = windows.get(layer.window, 0) + 1
        for length in lengths:
            total += 6 * self.active_matrices * length
            total += sum(pair * count * _visible(length, window) for window, count in windows.items())
        return total


def _visible(length: int, window: int | None) -> int:
    """Pairs of a token and a key that it sees: 1 + 2 + ... + length, each at most `window`."""
    full = min(length, window or length)
    return full * (full + 1) // 2 + (length - full) * full


def mfu(flops: float, seconds: float, num_gpus: int, peak_tflops: float) -> float:
    """Part of the machine's peak that the model's operations are: flops / (seconds * num_gpus * peak)."""
    return flops / (seconds * num_gpus * peak_tflops * 1e12)

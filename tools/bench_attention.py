"""The portable attention beside Megatron's local one: time and memory of forward and backward, 1k to 16k tokens.

    python -m tools.bench_attention [--lengths 1024 2048 4096 8192 16384] [--heads 8] [--groups 2] [--channels 64]

Columns: `local` is Megatron's DotProductAttention, which holds the matrix of scores and takes no micro-batch;
`portable` the same single sequence; `packed` a micro-batch of as many tokens in sequences of 512; `window` the same
single sequence with a sliding window of 512, through the interval attention; `interval` the whole sequence through it,
as under context parallelism. Each measurement is a process of its own, in float32 with the threads that torch takes;
memory is the peak of the process above what it had before.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

KINDS = ("local", "portable", "packed", "window", "interval")
LOCAL_LIMIT_GB = 10.0
"""Scores of more than this are not tried: heads x tokens^2 in float32, about four times over."""


def measure(kind: str, tokens: int, heads: int, groups: int, channels: int) -> dict[str, float]:
    """Seconds and peak bytes of one forward and backward pass, the second of two."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    import megatron_rl.device  # noqa: F401  (prepares Megatron-Core before any of it is imported)
    from megatron_rl.models.attention import PortableAttention

    config = TransformerConfig(
        num_layers=1,
        hidden_size=heads * channels,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=channels,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        use_cpu_initialization=True,
        window_size={"window": (511, 0), "interval": (tokens, 0)}.get(kind),
    )
    q, k, v = (torch.randn(tokens, n, channels, requires_grad=True) for n in (heads, groups, groups))

    class One:
        tp = type("G", (), {"size": staticmethod(lambda: 1), "rank": staticmethod(lambda: 0)})()

    if kind == "local":
        parallel_state._set_global_memory_buffer()
        get_cuda_rng_tracker().add("model-parallel-rng", 1)
        local = DotProductAttention(config, 1, AttnMaskType.causal, "self", pg_collection=One())
        mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).triu(1)

        def run() -> torch.Tensor:
            return local(q[:, None], k[:, None], v[:, None], mask)
    else:
        attention = PortableAttention(config, layer_number=1)
        step = 512 if kind == "packed" else tokens
        bounds = torch.arange(0, tokens + 1, step, dtype=torch.int32)

        def run() -> torch.Tensor:
            params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
            return attention(q, k, v, packed_seq_params=params)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = 0.0
    for _ in range(2):
        begin = time.perf_counter()
        run().sum().backward()
        seconds = time.perf_counter() - begin
    return {"seconds": seconds, "bytes": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--one", nargs=2, metavar=("KIND", "TOKENS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = (arguments.heads, arguments.groups, arguments.channels)
    if arguments.one:
        print(json.dumps(measure(arguments.one[0], int(arguments.one[1]), *shape)))
        return
    print(f"{'tokens':>8}" + "".join(f"{kind + ' s':>12}{'MB':>7}" for kind in KINDS))
    for tokens in arguments.lengths:
        line = f"{tokens:>8}"
        for kind in KINDS:
            if kind == "local" and 16e-9 * arguments.heads * tokens**2 > LOCAL_LIMIT_GB:
                line += f"{'-':>12}{'-':>7}"
                continue
            options = [f"--{name}={value}" for name, value in zip(("heads", "groups", "channels"), shape, strict=True)]
            command = [sys.executable, __file__, "--one", kind, str(tokens), *options]
            found = json.loads(
                subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            )
            line += f"{found['seconds']:>12.3f}{found['bytes'] / 1e6:>7.0f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()

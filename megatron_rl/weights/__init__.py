"""Tensors between Megatron parameters and files, ranks and engines, by the families' tensor maps.

    plan/       which rank sends which slice to which rank; no tensors
    transport/  how slices travel: messages, and the transports that carry them
    files/      Hugging Face checkpoints: read and written by slice, or gathered tensor by tensor
    quantized/  formats of quantised weights, and parameters that are kept in FP8

`transport` and `files` import `plan` and `quantized`, never the reverse. Every layout comes from
`models/tensor_map.py`. Start with `plan/shard_plan.py`.
"""

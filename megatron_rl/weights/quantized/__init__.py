"""Quantised weights.

    formats.py         formats that an engine or an export can have: fp8, fp8_block, int8, int4, nvfp4; their rounding,
                       their layout in compressed-tensors checkpoints, and AWQ's scales; torch alone; start here
    fp8_parameters.py  Megatron parameters that are kept in FP8: reading and filling them

How a quantised checkpoint is read is in `weights/files`.
"""

"""Hugging Face checkpoints: read by slice, written by slice, or gathered to whole tensors.

    hf_checkpoint.py      the tensors of a checkpoint folder, and whether they are the model of config.json; no torch
    stored_forms.py       forms of a stored weight: plain, float8 with block scales, MXFP4; no torch
    hf_reader.py          fills a rank's shards from the files
    hf_writer.py          writes a folder, in one process or by all ranks at once
    gather.py             whole tensors from the shards of all ranks, bucket by bucket
    local_shards.py       this rank's parameters under the tables' names, and their row ranges as views
    safetensors_files.py  the file format

Start with `hf_reader.py`.
"""

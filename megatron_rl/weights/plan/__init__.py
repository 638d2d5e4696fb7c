"""The shard plan of a weight sync, from layouts alone: no tensor, no process group, no device.

shard_plan.py    sources x targets -> which rank sends which slice in which bucket; start here
rank_plan.py     one rank's part of it, and its text form for a rank in another process
ranks.py         which ranks own which parameter, on the trained side and on the engines'
engine_table.py  vLLM's parameters as tensor maps: fused, stacked, padded
blocks.py        blocks of matrices and their intersections
cuts.py          how a parameter's copies are cut among the replicas that send it
"""

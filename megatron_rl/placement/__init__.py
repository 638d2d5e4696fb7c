"""What runs where, from the configuration alone; without torch.

layout.py  ranks in tensor, context, pipeline, data and expert dimensions, and the engine that each drives; start here
tasks.py   the tasks of a job: training ranks first, then engines with processes of their own
sizes.py   parameters, operations and bytes of a model
plan.py    memory per rank and the pipeline bubble of a layout, for `megatron-rl plan`
"""

"""Training state on disk, and Hugging Face checkpoints in and out.

training_state.py   what a checkpoint contains, and how a run resumes from it; start here
optimizer_state.py  the optimizer's state as tensors of the model, for any layout
writer.py           writes checkpoints in the background
folders.py          the folder of a run's checkpoints: names, the latest, which are deleted
integrity.py        whether a checkpoint is complete and undamaged
hf_export.py        the policy as a Hugging Face checkpoint
convert.py          `megatron-rl convert`, both directions
stored_names.py     tensor names in the checkpoints of other Megatron runs
"""

import megatron_rl.device  # noqa: F401  (prepares Megatron-Core before any of it is imported)

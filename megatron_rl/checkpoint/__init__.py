"""Training state on disk, and Hugging Face checkpoints in and out."""

import megatron_rl.device  # noqa: F401  (prepares Megatron-Core before any of it is imported)

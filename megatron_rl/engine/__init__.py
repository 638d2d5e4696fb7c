"""Training on Megatron-Core: groups, policy, optimizer, forward and backward."""

import megatron_rl.device  # noqa: F401  (prepares Megatron-Core before any of it is imported)

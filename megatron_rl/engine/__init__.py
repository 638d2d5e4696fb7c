"""Training on Megatron-Core: forward and backward passes over micro-batches, and the optimizer.

policy             this rank's shard of the model; start here
step               forward_backward, forward_log_probs and the other passes
head               from hidden states to log-probs and entropy without logits
micro_batch_part   the context-parallel part of a micro-batch
optimizer          Megatron's optimizer and schedule; memory given up while engines generate
reference          reference weights and teachers
scalar_model       critics and reward models: one number per token
routing            replayed routes of experts, and the scale of auxiliary losses
quantized_layers   layers that compute as a quantised engine does
initialize         join the training ranks
"""

import megatron_rl.device  # noqa: F401  (prepares Megatron-Core before any of it is imported)

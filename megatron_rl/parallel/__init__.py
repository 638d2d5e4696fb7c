"""What needs process groups, with torch alone; groups are arguments.

groups.py                      the groups of a rank; sums of metrics and counts over ranks
vocab_parallel.py              log-probs and entropy from logits that are sharded by vocabulary; start here
vocab_statistics.py            its formulas, per tile; triton_kernels.py: the same on CUDA
vocab_parallel_divergences.py  KL divergences and several log-probs per token from sharded logits
filtered_log_probs.py          log-probs under top-k and top-p sampling
fused_linear_log_probs.py      log-probs from hidden states, without stored logits
fused_linear_token_loss.py     output layer and a loss of single tokens in one pass
fused_linear_logits_loss.py    output layer and a loss of whole distributions in one pass
linear_head.py                 what the fused heads share: arguments, tiles, gradients
context_parallel.py            packed rows over context-parallel ranks
interval_attention.py          attention in which a query sees one interval of keys
"""

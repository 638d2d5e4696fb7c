"""Pure functions of torch tensors: losses, advantages, KL, aggregation. No configuration, no Megatron.

    policy_loss, value_loss, supervised_loss, preference_loss   losses per token, pair or completion
    advantages        from rewards to advantages, of completions and of tokens (GAE)
    reward_shaping    rewards per token; penalties for length and KL
    kl, importance    KL estimators; importance weights between engine and trainer
    aggregation       from losses per token to one number; sums over sequences
    metrics           metrics that add up over micro-batches and ranks
    diagnostics       convergence, and the mismatch between engine and trainer
    schedules         coefficients over the steps of a run

Start with `policy_loss.ppo_clip_loss` and `aggregation.aggregation_weights`. What a run makes of them is `objectives`.
"""

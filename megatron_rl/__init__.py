"""RL post-training of Megatron-Core models with vLLM rollouts, without Ray.

The rooms, from the bottom up; imports point down only:

    config      typed schema, YAML and overrides; no torch
    placement   which rank holds which part of the model and drives which engine; no torch
    algorithms  losses, advantages, KL, aggregation: pure torch functions
    data        prompts, samples, chat templates, packing, balancing
    rewards     text -> score
    parallel    log-probs over a sharded vocabulary, reductions; process groups are arguments
    device      what makes Megatron-Core run on a CPU
    models      Hugging Face config -> Megatron-Core model, and the table of where each tensor goes
    weights     moving tensors through that table: files, other ranks, vLLM
    engine      initialise, forward and backward, optimizer, log-probs
    checkpoint  training state; Hugging Face import and export
    rollout     vLLM
    trainer     the loop, evaluation, metrics, report
    cli         parse, build, call
"""

__version__ = "0.1.0"

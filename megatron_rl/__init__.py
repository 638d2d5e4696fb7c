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
    engine      forward and backward over micro-batches, optimizer, log-probs
    checkpoint  training state; Hugging Face import and export
    rollout     vLLM engines
    runs        the folder of a run: logs, progress, watchdog
    objectives  losses and advantage estimators by name, bound to micro-batches
    sync        the trained weights into the engines
    report      report.html of a run
    trainer     the recipes: RL, SFT, preferences, reward models
    cli         parse, build, call
"""

__version__ = "0.1.0"

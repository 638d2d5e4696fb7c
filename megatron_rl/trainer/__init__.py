"""The recipes: RL, SFT, preference training and reward models.

loop             reinforcement learning on one screen; start here
rl               the verbs of that loop
rollouts         prompts in, scored samples out; dynamic sampling
training         what every recipe shares: folder, policy, optimizer, metrics, checkpoints, resuming
update           one optimizer step, and what may keep it from being made: guards
sft, preference  the other recipes
evaluation       held-out accuracy, pass@k and reward
learned_reward   a reward model's scores
quantize         a trained policy as a quantised checkpoint
run              the entry points of a rank
"""

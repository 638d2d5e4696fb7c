"""What a run's configuration makes of `algorithms`: losses and estimators by name, bound to micro-batches.

    objectives              SFT, policy gradient and value objectives: outputs of a micro-batch -> loss and metrics
    preference_objectives   the same on preference data, for policies and reward models
    minibatch               `MiniBatch`: the micro-batches of one optimizer step, and its global counts
    advantages              advantage estimators by name; rewards of a step -> advantages of its tokens
    losses                  losses by name, and a user's own
    penalties               KL penalty and length penalty

Start with `objectives.PolicyGradientObjective`.
"""

"""The configuration of a run: its schema, how it is read, and what is checked before any process starts. No torch.

schema           one dataclass per owner, a docstring under every field; start here
load             YAML files and overrides -> `Config`
validate         whether the values go together and fit the model and the files
ranges           the allowed range of every number
algorithm, numerics, world   checks and sizes by topic: the algorithm, FP8 and quantisation, ranks and layers
functions        built-in or user functions that a configuration names
hf_checkpoint    config.json and the headers of a Hugging Face checkpoint
errors           `UserError`, exit codes
"""

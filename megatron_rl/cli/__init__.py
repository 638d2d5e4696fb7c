"""The command line: parse, check, call. Nothing here computes.

main               the parser, and what exit codes mean; start here
train              `train` and `evaluate`: check everything, then be a rank or start the ranks
commands           `convert`, `quantize`, `report`
plan, doctor       what a configuration needs; what is installed and fits, and what happened to a run
launch_local       start ranks on this machine
launch_slurm       submit a configuration to Slurm
rank_environment   which rank this process is, under torchrun or srun
"""

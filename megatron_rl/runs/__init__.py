"""The folder of a run, and everything that is written there besides checkpoints.

directory      where every file of a run is, and the lock that one process holds; start here
record         what rank 0 writes: configuration, metrics, rollouts; `RunState`
logs           metrics.jsonl, TensorBoard and W&B; rollouts/
progress       the progress bar, and how long each phase of a step takes
watchdog       ends a run that hangs, and says who waits for whom
diagnosis      what happened to a run, from its folder alone
interruption   SIGTERM and SIGUSR1, agreed on by all ranks
"""

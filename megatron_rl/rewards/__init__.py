"""From text to scores: built-in rewards, a user's own, and the processes that they run in.

scoring       finds the functions that a configuration names, and calls them on completions; start here
extraction    what of a completion is its answer
answers       numbers and texts compared; mathematics/ compares everything else that answers can be
formats, instructions, prose   rewards for form, for instructions that a program can check, for how a text is written
references    reference answers that cannot be read, found at the start
pool, worker  user functions in processes that can be killed
"""

"""From text to scores: built-in rewards, a user's own, and the processes that they run in.

scoring   finds the functions that a configuration names, and calls them on completions; start here
answers   built-in rewards for the right answer and the right form
pool      user functions in processes that can be killed
worker    such a process
"""

"""From data files to token ids and micro-batches.

samples       `Prompt`, `Completion`, `Sample`, `TrainingSequence`; start here
files         rows of JSON lines, Parquet and GSM8K files, each with its file and line
chat          prompts to token ids: templates and the tokenizer
datasets      prompts for RL, sequences for SFT, and the order in which rows are drawn
preferences   preference data: pairs, single completions with labels, steps with labels
packing       which rank and micro-batch each sequence goes to; `MicroBatch`
"""

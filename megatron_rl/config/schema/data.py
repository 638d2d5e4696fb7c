"""Training and evaluation data."""

from dataclasses import dataclass


@dataclass
class DataConfig:
    """Training and evaluation data: JSONL or Parquet files."""

    train: str | None = None
    """Training file. RL: `prompt` (and `answer`). SFT: `prompt` and `response`. Preferences: `prompt`, `chosen` and
    `rejected`, or `prompt`, `response` and `label`; see `data/preferences.py`."""
    eval: str | None = None
    """Held-out file, of the same form; null: no evaluation."""
    prompt_key: str = "prompt"
    """Field with the prompt: a string, or a list of chat messages {role, content}."""
    answer_key: str = "answer"
    """Field with the reference answer that rewards see."""
    response_key: str = "response"
    """Field with the target text of SFT, or with the completion that has a label or score."""
    chosen_key: str = "chosen"
    """Field with the better completion of a pair: text, or chat messages that end in the assistant's."""
    rejected_key: str = "rejected"
    """Field with the worse completion."""
    label_key: str = "label"
    """Label of a single completion: true or false, or a number; for each step of a list of steps, a list."""
    margin_key: str | None = None
    """Field with how much better the chosen completion is, for a loss with a margin."""
    format: str = "jsonl"
    """'jsonl', 'parquet', or 'gsm8k' (JSONL with `question` and `answer` ending in `#### n`)."""
    system_prompt: str | None = None
    """Prepended as a system message, if set; makes string prompts chat messages."""
    apply_chat_template: bool | None = None
    """null: the tokenizer's chat template is used for message lists and not for strings. true, false: force it."""
    prompt_template: str | None = None
    """A Python format string around string prompts, e.g. 'Question: {prompt}\\nAnswer:'."""
    max_prompt_tokens: int = 1024
    """Longer prompts are an error, named by file and line."""
    shuffle: bool = True
    """Draw the training rows in an order shuffled anew each epoch, from `seed`."""

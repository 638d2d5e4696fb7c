"""The tokenizer of a checkpoint folder."""

from pathlib import Path
from typing import Any

from megatron_rl.config.errors import UserError


def load_tokenizer(hf_path: str | Path) -> Any:
    """transformers' tokenizer of a folder; code from the folder is never run.

    Raises:
        UserError: the folder holds no tokenizer that can be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(hf_path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model.hf_path: no readable tokenizer in {hf_path}: {str(error).splitlines()[0]}") from error

"""From the prompt of a row to text and token ids, with the tokenizer of a checkpoint folder.

A prompt is a string or a list of chat messages. One of two routes leads to tokens, chosen by `DataConfig`:

    plain   prompt_template around the string, tokenised. A beginning-of-sequence token is put in front exactly when
            the tokenizer does so by itself (Llama does, Qwen does not): that is what the model was pre-trained on and
            what vLLM does with a text prompt. No other special token is added; above all no end-of-sequence token,
            which some tokenizers append and which would tell the model that all is said.
    chat    messages through the tokenizer's chat template, with the opening of the assistant's turn. The template
            writes all special tokens itself, so none is added.

The engine receives the token ids made here and never the text, hence training and generation see the same prompt.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from megatron_rl.config.errors import UserError
from megatron_rl.config.schema import DataConfig
from megatron_rl.data.files import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]


def render_prompts(
    prompts: Sequence[Any], sources: Sequence[str], data: DataConfig, tokenizer: "PreTrainedTokenizerBase"
) -> list[tuple[str, list[int]]]:
    """(text, token ids) of every prompt.

    Args:
        prompts: strings or lists of messages {role, content}, mixed as they come.
        sources: 'file:line' of each prompt, for errors.
        data: `prompt_template`, `system_prompt` and `apply_chat_template` choose the route.
        tokenizer: of the model.

    Raises:
        DataError: a prompt that is empty or of another kind, settings that contradict each other or the tokenizer.
    """
    _check_settings(data)
    bos = leading_bos(tokenizer)
    texts: list[str] = []
    plain: list[bool] = []
    for prompt, source in zip(prompts, sources, strict=True):
        messages = _messages(prompt, source, data)
        plain.append(messages is None)
        texts.append(_apply_template(messages, source, tokenizer) if messages is not None else _fill(data, prompt))
    rendered = []
    for text, is_plain, ids in zip(texts, plain, tokenize(texts, tokenizer), strict=True):
        needs_bos = is_plain and bos and ids[:1] != bos  # a dataset may have written it out already
        rendered.append((text, bos + ids if needs_bos else ids))
    return rendered


def tokenize(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Token ids of each text, without any special token added. One call for all: the fast tokenizers run in Rust."""
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
    return ids


def leading_bos(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """[bos] if the tokenizer puts its beginning-of-sequence token before a text by default, else []."""
    added = tokenizer("")["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and added[:1] == [bos] else []


def _check_settings(data: DataConfig) -> None:
    if data.system_prompt is not None and data.apply_chat_template is False:
        raise DataError("data.system_prompt needs a chat template, but data.apply_chat_template is false")
    if data.prompt_template is None:
        return
    try:
        filled = data.prompt_template.format(prompt="\0")
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        reason = f"unknown field {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(
            f"data.prompt_template: {data.prompt_template!r} is not a format string with the one field {{prompt}} "
            f"({reason}); write literal braces as {{{{ and }}}}"
        ) from error
    if "\0" not in filled:
        raise DataError(f"data.prompt_template: {data.prompt_template!r} lacks the field {{prompt}}")


def _fill(data: DataConfig, prompt: str) -> str:
    return prompt if data.prompt_template is None else data.prompt_template.format(prompt=prompt)


def _messages(prompt: Any, source: str, data: DataConfig) -> list[Message] | None:
    """The chat messages of a prompt, or None if it is to be tokenised as a plain string."""
    if not isinstance(prompt, str | list):
        kind = type(prompt).__name__
        raise DataError(f"{source}: a prompt must be a string or a list of messages {{role, content}}, this is {kind}")
    if not prompt:
        raise DataError(f"{source}: the prompt is empty")
    if isinstance(prompt, str):
        if not (data.apply_chat_template or data.system_prompt is not None):
            return None
        messages = [{"role": "user", "content": _fill(data, prompt)}]
    else:
        if data.apply_chat_template is False:
            raise DataError(f"{source}: the prompt is a list of messages, but data.apply_chat_template is false")
        messages = prompt
        for message in messages:
            if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
                raise DataError(f"{source}: a message must hold 'role' and 'content' as strings, this is {message!r}")
    if data.system_prompt is None:
        return messages
    if messages[0]["role"] == "system":
        raise DataError(f"{source}: the prompt has a system message of its own, and data.system_prompt is set too")
    return [{"role": "system", "content": data.system_prompt}, *messages]


def _apply_template(messages: list[Message], source: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    if not tokenizer.chat_template:
        raise DataError(f"{source}: the prompt is a chat, but the tokenizer has no chat template")
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise DataError(f"{source}: the tokenizer's chat template refuses the messages: {error}") from error
    return text


def load_tokenizer(hf_path: str | Path, key: str = "model.hf_path") -> Any:
    """transformers' tokenizer of a folder; code from the folder is never run.

    Token ids are those of tokenizer.json, where there is one. The class that tokenizer_config.json names may put a
    pre-tokenizer of its own in the place of the file's, so no class is asked for; a probe text is compared.

    Args:
        key: of the configuration, for errors.

    Raises:
        UserError: no tokenizer that can be read; transformers reads it otherwise than tokenizer.json says.
    """
    from transformers import PreTrainedTokenizerFast

    file = Path(hf_path) / "tokenizer.json"
    try:
        if not file.is_file():
            from transformers import AutoTokenizer  # imports torch

            return AutoTokenizer.from_pretrained(hf_path, trust_remote_code=False)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(hf_path, local_files_only=True)
        reason = _differs(tokenizer, file)
    except Exception as error:  # the tokenizers library raises Exception itself
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{key}: no readable tokenizer in {hf_path}: {first}") from error
    if reason is not None:
        raise UserError(f"{key}: {file} and tokenizer_config.json beside it say different things: {reason}")
    return tokenizer


_PROBE = "hello world  a b\n\tdef f(x): 1234567.89 \u00e9\u00fc \u4e2d\u6587 \U0001f600 \u2212 <|im_start|>"
"""Spaces, digits, accents, scripts without spaces, an emoji, and what may be a special token."""


def _differs(tokenizer: Any, file: Path) -> str | None:
    """Where a tokenizer departs from a tokenizer.json; None: nowhere in the probe."""
    from tokenizers import Tokenizer

    theirs = Tokenizer.from_file(str(file))
    specials = [token.content for token in theirs.get_added_tokens_decoder().values()][:64]
    for text in (_PROBE, *_PROBE.split(" "), *specials):
        ours, right = (
            tokenizer(text, add_special_tokens=False)["input_ids"],
            theirs.encode(text, add_special_tokens=False),
        )
        if ours != right.ids:
            return f"{text!r} becomes {ours} and {right.ids}"
    return None

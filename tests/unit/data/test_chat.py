"""Both routes from prompt to tokens, against the tokenizer used one text at a time.

The tokenizer of `tests.checkpoints` has one token per byte, so expected ids can be written down from the text.
"""

import json
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from megatron_rl.config.schema import DataConfig
from megatron_rl.data.chat import leading_bos, load_tokenizer, render_prompts, tokenize
from megatron_rl.data.files import DataError
from tests.checkpoints import BOS_TOKEN_ID, EOS_TOKEN_ID, make_tokenizer

USER = [{"role": "user", "content": "Hi"}]


def render(prompt: Any, tokenizer: Any = None, **settings: Any) -> tuple[str, list[int]]:
    return render_prompts([prompt], ["f:1"], DataConfig(**settings), tokenizer or make_tokenizer())[0]


def adding(template: str) -> Any:
    """A tokenizer that writes special tokens around a text by default, as Llama's does."""
    tokenizer = make_tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<bos>", BOS_TOKEN_ID), ("<eos>", EOS_TOKEN_ID)]
    )
    return tokenizer


def test_plain_string_goes_through_the_prompt_template_only() -> None:
    text, ids = render("2 {+} 2", prompt_template="Q: {prompt}\n{{A}}:")
    assert text == "Q: 2 {+} 2\n{A}:"
    assert len(ids) == len(text)  # one token per byte, no special token
    assert make_tokenizer().decode(ids) == text


def test_messages_go_through_the_chat_template_with_the_assistants_turn_opened() -> None:
    text, ids = render(USER)
    assert text == "user: Hi\nassistant: "
    assert ids == make_tokenizer()(text, add_special_tokens=False)["input_ids"]


def test_a_system_prompt_makes_a_string_a_chat_and_the_template_wraps_its_content() -> None:
    text, _ = render("Hi", system_prompt="Be brief.", prompt_template="<{prompt}>")
    assert text == "system: Be brief.\nuser: <Hi>\nassistant: "
    assert render(USER, system_prompt="Be brief.")[0] == "system: Be brief.\nuser: Hi\nassistant: "


def test_apply_chat_template_true_makes_a_string_the_users_message() -> None:
    assert render("Hi", apply_chat_template=True) == render(USER)
    assert render("Hi", apply_chat_template=False)[0] == "Hi"


def test_plain_string_gets_the_bos_that_the_tokenizer_adds_by_default_but_no_eos() -> None:
    hi = make_tokenizer()("Hi")["input_ids"]
    assert render("Hi", adding("<bos> $A"))[1] == [BOS_TOKEN_ID, *hi]
    assert render("Hi", adding("<bos> $A <eos>"))[1] == [BOS_TOKEN_ID, *hi]
    assert render("Hi", adding("$A <eos>"))[1] == hi
    assert leading_bos(make_tokenizer()) == []  # it has a BOS token, and does not use it


def test_bos_is_not_doubled_where_the_text_or_the_chat_template_has_written_it() -> None:
    tokenizer = adding("<bos> $A")
    assert render("<bos>Hi", tokenizer)[1] == render("Hi", tokenizer)[1]
    assert BOS_TOKEN_ID not in render(USER, tokenizer)[1]
    tokenizer.chat_template = "<bos>" + tokenizer.chat_template
    assert render(USER, tokenizer)[1].count(BOS_TOKEN_ID) == 1


def test_a_mixed_batch_equals_one_prompt_at_a_time() -> None:
    prompts = ["a", USER, "longer text, é", [{"role": "user", "content": "x"}], "b"]
    tokenizer = adding("<bos> $A")
    together = render_prompts(prompts, ["f"] * 5, DataConfig(), tokenizer)
    assert together == [render(prompt, tokenizer) for prompt in prompts]


def test_tokenize_neither_pads_nor_truncates_whatever_the_tokenizers_file_asks_for() -> None:
    tokenizer = make_tokenizer()
    tokenizer._tokenizer.enable_padding(length=8)
    tokenizer._tokenizer.enable_truncation(max_length=2)
    assert [len(ids) for ids in tokenize(["a", "abcd"], tokenizer)] == [1, 4]
    assert tokenize([], tokenizer) == []


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ("", {}, "f:1: the prompt is empty"),
        ([], {}, "f:1: the prompt is empty"),
        (7, {}, "f:1: a prompt must be a string or a list of messages"),
        ([{"role": "user"}], {}, "f:1: a message must hold 'role' and 'content' as strings"),
        (["Hi"], {}, "f:1: a message must hold 'role' and 'content' as strings"),
        (USER, {"apply_chat_template": False}, "data.apply_chat_template is false"),
        ("Hi", {"apply_chat_template": False, "system_prompt": "s"}, "data.system_prompt needs a chat template"),
        ([{"role": "system", "content": "mine"}], {"system_prompt": "s"}, "a system message of its own"),
        ("Hi", {"prompt_template": "Q: {question}"}, "unknown field 'question'"),
        ("Hi", {"prompt_template": "Q: {}"}, "not a format string with the one field {prompt}"),
        ("Hi", {"prompt_template": "Q: {prompt"}, "not a format string with the one field {prompt}"),
        ("Hi", {"prompt_template": "Q: prompt"}, "lacks the field {prompt}"),
    ],
)
def test_errors(prompt: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as error:
        render(prompt, **settings)
    assert message in str(error.value)


def test_a_tokenizer_without_or_with_a_refusing_chat_template() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        DataError, match="f:1: the tokenizer's chat template refuses the messages: roles must alternate"
    ):
        render(USER, tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="f:1: the prompt is a chat, but the tokenizer has no chat template"):
        render(USER, tokenizer)
    assert render("Hi", tokenizer)[0] == "Hi"


@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "LlamaTokenizer", "Qwen2Tokenizer", "GPT2Tokenizer", None])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", None])
def test_tokens_are_those_of_tokenizer_json_whatever_class_is_named(tmp_path, name, model_type):
    make_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": name}))
    if model_type is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    right = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    for text in ("hello world", " a  b\n", "1234", "\u00e9\u4e2d \U0001f600", "<eos>x"):
        assert ours(text, add_special_tokens=False)["input_ids"] == right.encode(text, add_special_tokens=False).ids
        assert ours.decode(ours(text)["input_ids"], skip_special_tokens=False) == text

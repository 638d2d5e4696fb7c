"""GSM8K's own rows become responses that earn the rewards they are made for, and no others."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_rl.rewards.answers import numeric_answer
from megatron_rl.rewards.formats import final_answer_format, think_format
from tools.prepare_gsm8k import main, marked_response_of, prompt_of, prose_response_of

DATA = Path(__file__).parents[3].parent / "shared" / "data" / "gsm8k"
NUM_ROWS = 200


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (DATA / "train.jsonl").is_file():
        pytest.skip("GSM8K is not beside the repository, in ../shared/data/gsm8k")
    folder = tmp_path_factory.mktemp("gsm8k")
    size = ["--max-rows", str(NUM_ROWS), "--vocab-size", "601", "--hidden-size", "128", "--num-layers", "1"]
    main(["--data", str(DATA), "--out", str(folder), *size])
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_row_by_hand() -> None:
    row = {"prompt": " How much? ", "answer": "1200", "response": "600*2 = $<<600*2=1200>>1,200.\nYes.\n#### 1,200"}
    assert prompt_of(row) == "How much?\n"
    assert marked_response_of(row) == "<think>\n600*2 = $1,200.\nYes.\n</think>\n#### 1200"
    assert prose_response_of(row) == "600*2 = $1,200.\nYes.\nThe answer is 1200."


def test_both_forms_earn_the_answer_and_one_of_them_the_formats(made: Path) -> None:
    demonstrations, problems = rows(made / "sft.jsonl"), rows(made / "train.jsonl")
    assert len(problems) == NUM_ROWS
    for marked, prose, problem in zip(demonstrations[::2], demonstrations[1::2], problems, strict=True):
        for row, form in ((marked, 1.0), (prose, 0.0)):
            assert row["prompt"] == problem["prompt"]
            assert numeric_answer(completion=row["response"], answer=problem["answer"]) == 1.0
            assert think_format(prompt=row["prompt"], completion=row["response"]) == form
            assert final_answer_format(completion=row["response"]) == form
            assert "<<" not in row["response"]


def test_the_tokenizer_round_trips_and_keeps_the_marks_of_the_thought(made: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made / "model")
    assert len(tokenizer) == 601
    # Held-out texts, and characters that no training text holds.
    for text in [row["prompt"] for row in rows(made / "test.jsonl")] + ["é 答案 \u2212 \t\n"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    response = rows(made / "sft.jsonl")[0]["response"]
    ids = tokenizer(response)["input_ids"]
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == response
    assert len(tokenizer("<think></think>")["input_ids"]) == 2
    assert len(tokenizer("1234")["input_ids"]) == 4  # one token per digit


def test_the_checkpoint_belongs_to_the_tokenizer(made: Path) -> None:
    model, tokenizer = (cls.from_pretrained(made / "model") for cls in (AutoModelForCausalLM, AutoTokenizer))
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.eos_token_id == tokenizer.eos_token_id


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"error: .*train\.jsonl: no such data file"):
        main(["--data", str(tmp_path), "--out", str(tmp_path / "out")])

"""The quickstart's material is right, disjoint, reproducible, and a checkpoint that others can read."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from megatron_rl.config.schema import DataConfig
from megatron_rl.data.datasets import load_prompts, load_sft
from tools.make_arithmetic import VOCABULARY, Problem, main, make_problems

SIZES = ["--num-sft", "50", "--num-train", "60", "--num-heldout", "20", "--hidden-size", "32", "--num-layers", "1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arithmetic")
    main([str(folder), *SIZES])
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_answer_is_right_and_no_problem_stands_twice(made: Path) -> None:
    files = {name: rows(made / f"{name}.jsonl") for name in ("sft", "train", "heldout")}
    assert {name: len(content) for name, content in files.items()} == {"sft": 50, "train": 60, "heldout": 20}
    problems = [row["prompt"] for content in files.values() for row in content]
    assert len(set(problems)) == 130
    for content in files.values():
        for row in content:
            assert row["prompt"].endswith("=")
    for row in files["train"] + files["heldout"]:
        assert str(eval(row["prompt"][:-1])) == row["answer"]


def test_demonstrations_slip_at_the_given_rate_and_only_in_the_carry(tmp_path: Path) -> None:
    def slips(rate: str) -> list[tuple[str, str]]:
        main([str(tmp_path), *SIZES, "--num-sft", "2000", "--slip-rate", rate])
        sft = [(row["prompt"], row["response"]) for row in rows(tmp_path / "sft.jsonl")]
        return [(prompt, response) for prompt, response in sft if str(eval(prompt[:-1])) != response]

    assert slips("0") == []
    # A carry is due in all but 55 * 55 of 100 * 100 sums (each digit pair sums below 10 in 55 of 100 cases): 69.75 %.
    # Of 2,000 rows 1,395 slip, standard deviation 20.5; at rate 0.6 it is 837 and 22. Five of them are allowed.
    assert abs(len(slips("1")) - 1395) < 5 * 20.5
    wrong = slips("0.6")
    assert abs(len(wrong) - 837) < 5 * 22
    for prompt, response in wrong:
        left, right = prompt[:-1].split("+")
        assert int(response) % 10 == (int(left) + int(right)) % 10  # the last digit needs no carry


@pytest.mark.parametrize(
    ("problem", "prompt", "answer", "slip"),
    [
        (Problem(12, "+", 7), "12+7=", "19", "19"),
        (Problem(47, "+", 38), "47+38=", "85", "75"),
        (Problem(99, "+", 1), "99+1=", "100", "90"),
        (Problem(42, "-", 17), "42-17=", "25", "35"),
        (Problem(17, "-", 42), "17-42=", "-25", "-35"),
        (Problem(3, "-", 12), "3-12=", "-9", "-19"),
        (Problem(5, "-", 5), "5-5=", "0", "0"),
    ],
)
def test_a_problem_by_hand(problem: Problem, prompt: str, answer: str, slip: str) -> None:
    assert (problem.prompt, problem.answer, problem.slip) == (prompt, answer, slip)


def test_problems_are_all_there_are_in_an_order_of_the_seed() -> None:
    assert {p.prompt for p in make_problems("+", 1, seed=0)} == {"0+0=", "0+1=", "1+0=", "1+1="}
    assert len(make_problems("+-", 9, seed=0)) == 200
    assert make_problems("+-", 9, seed=0) == make_problems("+-", 9, seed=0) != make_problems("+-", 9, seed=1)


def test_equal_arguments_make_equal_files(made: Path, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    main([str(tmp_path), *SIZES])
    assert torch.equal(torch.random.get_rng_state(), state)
    files = sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file())
    assert len(files) == 8
    assert all((made / file).read_bytes() == (tmp_path / file).read_bytes() for file in files)


def test_the_tokenizer_is_read_back_and_is_one_token_per_character(made: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made / "model")
    ids = tokenizer("12-7=")["input_ids"]
    assert ids == [VOCABULARY.index(character) for character in "12-7="]
    assert tokenizer.decode(ids) == "12-7="
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == "12-7="
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 1, 17)
    assert tokenizer("1 x")["input_ids"] == [VOCABULARY.index("1"), VOCABULARY.index(" "), 2]  # unknown, not dropped


def test_the_model_is_read_back_and_ends_at_the_tokenizers_eos(made: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(made / "model")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.vocab_size == 17
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert GenerationConfig.from_pretrained(made / "model").eos_token_id == 1


def test_the_files_load_as_data(made: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made / "model")
    prompt = load_prompts(made / "train.jsonl", DataConfig(), tokenizer, max_prompt_tokens=6)[0]
    assert prompt.text == rows(made / "train.jsonl")[0]["prompt"]
    first = rows(made / "sft.jsonl")[0]
    sequence = load_sft(made / "sft.jsonl", DataConfig(), tokenizer, max_tokens=12)[0]
    assert tokenizer.decode(sequence.token_ids) == first["prompt"] + first["response"] + "<eos>"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--operators", "*"], "--operators: '*' is given, allowed are +, - and +-"),
        (["--slip-rate", "60"], "--slip-rate: 60.0 is given, it must be in [0, 1]"),
        (["--max-operand", "9"], "'+' up to 9 makes only 100"),
        (["--num-heads", "3"], "--hidden-size must be a multiple of --num-heads"),
    ],
)
def test_mistakes(tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main([str(tmp_path / "out"), *arguments])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

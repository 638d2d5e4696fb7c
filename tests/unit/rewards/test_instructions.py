"""Instructions that a program can check, one that is followed and one that is not for each."""

from typing import Any

import pytest

from megatron_rl.rewards.instructions import CHECKS, instructions, instructions_fault

CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["apple", "pear"]}, "An apple, a pear.", "Apples and a pear."),
    ("keywords:frequency", {"keyword": "a", "frequency": 2, "relation": "at least"}, "A dog, a cat", "A dog and cat"),
    ("keywords:frequency", {"keyword": "a", "frequency": 2, "relation": "less than"}, "A dog", "a dog, a cat"),
    ("keywords:forbidden_words", {"forbidden_words": ["no"]}, "nothing", "No."),
    ("keywords:letter_frequency", {"letter": "z", "let_frequency": 2, "let_relation": "at least"}, "Zz", "z"),
    ("language:response_language", {"language": "de"}, "Das ist ein kurzer Satz.", "This is a short sentence."),
    ("length_constraints:number_sentences", {"num_sentences": 2}, "It is 3.5 m. Really!", "It is 3.5 m long."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "One\n***\nTwo", "One\n\nTwo"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "well-known man", "one two three"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "and"},
        "One\n\nAnd two",
        "And one\n\nTwo",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name], [street]", "[name]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye\nP.S. More", "Bye, psst"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n- b\n* c"),
    ("detectable_format:constrained_response", {}, "My answer is no.", "no."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and **b**", "*a* and b"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1\na\nSection 2\nb",
        "Section 1\na",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
    ("detectable_format:title", {}, "<<Hope>>\ntext", "<< >> text"),
    ("combination:two_responses", {}, "one\n******\ntwo", "one\n******\none"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it"}, "Say it\nIt.", "It."),
    ("startend:end_checker", {"end_phrase": "Right?"}, "So it is. Right?", "Right? Yes."),
    ("startend:quotation", {}, '"all of it"', '"some" of it'),
    ("change_case:capital_word_frequency", {"capital_frequency": 2}, "BIG and LOUD", "BIG and loud"),
    ("change_case:english_capital", {}, "ALL OF IT", "ALL of IT"),
    ("change_case:english_lowercase", {}, "all of it", "All of it"),
    ("punctuation:no_comma", {}, "one and two", "one, two"),
]


@pytest.mark.parametrize(("name", "arguments", "followed", "missed"), CASES)
def test_each_instruction(name: str, arguments: dict[str, Any], followed: str, missed: str) -> None:
    row = {"instruction_id_list": [name], "kwargs": [{**arguments, "another": None}]}
    assert instructions(prompt="p", completion=followed, row=row) == 1.0
    score = instructions(prompt="p", completion=missed, row=row)
    assert (float(score), score.notes) == (0.0, {"missed": name})


def test_all_are_tried() -> None:
    assert {name for name, *_ in CASES} == set(CHECKS)


def test_parts_count_unless_all_are_asked_for() -> None:
    row = {"instruction_id_list": ["punctuation:no_comma", "startend:quotation"], "kwargs": [{}, {}]}
    assert instructions(prompt="p", completion="no comma", row=row) == 0.5
    assert instructions(prompt="p", completion="no comma", row=row, partial=False) == 0.0
    assert instructions(prompt="p", completion="  ", row=row) == 0.0


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({}, "the row has no list 'instruction_id_list'"),
        ({"instruction_id_list": ["a:b"], "kwargs": []}, "'kwargs' must have an object for each of 1"),
        ({"instruction_id_list": ["a:b"], "kwargs": [{}]}, "no instruction 'a:b'"),
        (
            {"instruction_id_list": ["keywords:existence"], "kwargs": [{}]},
            "keywords:existence takes keywords, given none",
        ),
    ],
)
def test_rows_that_cannot_be_checked(row: dict[str, Any], fault: str) -> None:
    assert fault in str(instructions_fault(row))
    with pytest.raises(ValueError, match=r"instruction|kwargs|keywords"):
        instructions(prompt="p", completion="c", row=row)

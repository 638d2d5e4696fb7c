"""`instructions`: whether a completion follows instructions that a program can check, as in IFEval (arXiv:2311.07911).

A row names them as IFEval's files do: `instruction_id_list`, a list of 'kind:name', and `kwargs`, a list of as many
objects with their arguments; arguments that are null are left out. The checks are ours, so scores are near those of
IFEval's own program, not equal to them. An instruction or argument that is not known is found at the start.
"""

import inspect
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from megatron_rl.rewards.prose import detected_language, paragraphs, sentences, words
from megatron_rl.rewards.score import Score

Check = Callable[..., bool]

NAMES_KEY, ARGUMENTS_KEY = "instruction_id_list", "kwargs"


def instructions(*, prompt: str, completion: str, row: dict[str, Any], partial: bool = True) -> Score:
    """The share of the row's instructions that are followed, or, not `partial`, 1 if all are.

    Raises:
        ValueError: the row has no instructions, or one that is not known.
    """
    fault = instructions_fault(row)
    if fault is not None:
        raise ValueError(fault)
    missed = [
        name
        for name, arguments in zip(row[NAMES_KEY], _arguments(row), strict=True)
        if not completion.strip() or not CHECKS[name](completion, **_with_prompt(name, arguments, prompt))
    ]
    followed = len(row[NAMES_KEY]) - len(missed)
    value = followed / len(row[NAMES_KEY]) if partial else float(not missed)
    return Score(value, {"missed": ", ".join(missed)} if missed else {})


def instructions_fault(row: Mapping[str, Any]) -> str | None:
    """Why a row's instructions cannot be checked; None: they can."""
    names = row.get(NAMES_KEY)
    if not isinstance(names, list) or not names:
        return f"the row has no list {NAMES_KEY!r}"
    arguments = row.get(ARGUMENTS_KEY)
    if not isinstance(arguments, list) or len(arguments) != len(names):
        return f"{ARGUMENTS_KEY!r} must have an object for each of {len(names)} instructions"
    for name, given in zip(names, _arguments(row), strict=True):
        if name not in CHECKS:
            return f"no instruction {name!r}; known are {', '.join(CHECKS)}"
        parameters = [*inspect.signature(CHECKS[name]).parameters.values()][1:]
        allowed = {parameter.name for parameter in parameters}
        needed = {parameter.name for parameter in parameters if parameter.default is parameter.empty}
        if not set(given) <= allowed or not needed <= set(given) | {"prompt_to_repeat"}:
            takes, gets = (", ".join(sorted(keys)) or "none" for keys in (allowed, given))
            return f"{name} takes {takes}, given {gets}"
    return None


def _arguments(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{key: value for key, value in (one or {}).items() if value is not None} for one in row[ARGUMENTS_KEY]]


def _with_prompt(name: str, arguments: dict[str, Any], prompt: str) -> dict[str, Any]:
    return arguments if name != "combination:repeat_prompt" else {"prompt_to_repeat": prompt} | arguments


def _related(count: int, relation: str, bound: int) -> bool:
    return count < bound if relation == "less than" else count >= bound


def _occurrences(text: str, word: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE))


def keywords_existence(text: str, keywords: list[str]) -> bool:
    """All keywords occur."""
    return all(_occurrences(text, word) for word in keywords)


def keywords_frequency(text: str, keyword: str, frequency: int, relation: str = "at least") -> bool:
    """A keyword occurs less than, or at least, so many times."""
    return _related(_occurrences(text, keyword), relation, frequency)


def forbidden_words(text: str, forbidden_words: list[str]) -> bool:
    """None of the words occurs."""
    return not any(_occurrences(text, word) for word in forbidden_words)


def letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str = "at least") -> bool:
    """A letter occurs less than, or at least, so many times, in either case."""
    return _related(text.lower().count(letter.lower()), let_relation, let_frequency)


def response_language(text: str, language: str) -> bool:
    """The text is in the language of that ISO 639-1 code."""
    return detected_language(text) == language


def number_sentences(text: str, num_sentences: int, relation: str = "at least") -> bool:
    """It has less than, or at least, so many sentences."""
    return _related(len(sentences(text)), relation, num_sentences)


def number_paragraphs(text: str, num_paragraphs: int) -> bool:
    """It has exactly so many paragraphs, with a line '***' between them."""
    parts = [part.strip() for part in re.split(r"\s*\*\*\*\s*", text.strip().strip("*"))]
    return all(parts) and len(parts) == num_paragraphs


def number_words(text: str, num_words: int, relation: str = "at least") -> bool:
    """It has less than, or at least, so many words."""
    return _related(len(words(text)), relation, num_words)


def nth_paragraph_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """So many paragraphs, one of which, counted from 1, begins with a word."""
    parts = paragraphs(text)
    if len(parts) != num_paragraphs or not 1 <= nth_paragraph <= len(parts):
        return False
    first = words(parts[nth_paragraph - 1])[:1]
    return bool(first) and first[0].lower() == first_word.lower()


def number_placeholders(text: str, num_placeholders: int) -> bool:
    """At least so many [placeholders]."""
    return len(re.findall(r"\[[^\[\]\n]+\]", text)) >= num_placeholders


def postscript(text: str, postscript_marker: str) -> bool:
    """A line begins with the marker, 'P.S.' or 'P.P.S'."""
    letters = r"\s*".join(re.escape(letter) + r"\.?" for letter in postscript_marker.replace(".", "").replace(" ", ""))
    return re.search(rf"^\s*{letters}(?!\w)", text, re.IGNORECASE | re.MULTILINE) is not None


def number_bullet_lists(text: str, num_bullets: int) -> bool:
    """Exactly so many lines that begin with '* ' or '- '."""
    return len(re.findall(r"^\s*[*-]\s+\S", text, re.MULTILINE)) == num_bullets


def constrained_response(text: str) -> bool:
    """It says one of 'My answer is yes.', '... no.', '... maybe.'."""
    return re.search(r"my answer is (?:yes|no|maybe)\.", text, re.IGNORECASE) is not None


def number_highlighted_sections(text: str, num_highlights: int) -> bool:
    """At least so many *highlights* or **highlights**."""
    return len(re.findall(r"\*\*[^*\n]*\S[^*\n]*\*\*|(?<!\*)\*[^*\n]*\S[^*\n]*\*(?!\*)", text)) >= num_highlights


def multiple_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    """At least so many parts that begin with the word and a number: 'Section 1'."""
    return len(re.findall(rf"^\W*{re.escape(section_spliter)}\s+\d+", text, re.MULTILINE)) >= num_sections


def json_format(text: str) -> bool:
    """The whole text, or the only fenced block that it is, is JSON."""
    fenced = re.fullmatch(r"\s*```(?:json)?\s*(.*?)```\s*", text, re.IGNORECASE | re.DOTALL)
    try:
        json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return False
    return True


def title(text: str) -> bool:
    """It has a <<title>>."""
    return re.search(r"<<[^<>\n]*\w[^<>\n]*>>", text) is not None


def two_responses(text: str) -> bool:
    """Two different responses with '******' between them."""
    parts = [part.strip() for part in text.strip().strip("*").split("******")]
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


def repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
    """It begins with the request, word for word."""
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(text: str, end_phrase: str) -> bool:
    """It ends in the phrase."""
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(text: str) -> bool:
    """All of it is in double quotation marks."""
    text = text.strip()
    return len(text) > 2 and text[0] == text[-1] == '"'


def capital_word_frequency(text: str, capital_frequency: int, capital_relation: str = "at least") -> bool:
    """Less than, or at least, so many words in capitals."""
    return _related(sum(word.isupper() for word in words(text)), capital_relation, capital_frequency)


def english_capital(text: str) -> bool:
    """All letters are capitals."""
    return text.isupper()


def english_lowercase(text: str) -> bool:
    """No letter is a capital."""
    return text.islower()


def no_comma(text: str) -> bool:
    """No comma."""
    return "," not in text


CHECKS: dict[str, Check] = {
    "keywords:existence": keywords_existence,
    "keywords:frequency": keywords_frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": response_language,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_words": number_words,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "punctuation:no_comma": no_comma,
}

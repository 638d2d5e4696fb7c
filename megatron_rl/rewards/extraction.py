r"""What of a completion is its answer: apart from any comparison, so that it can be logged and counted.

    hash          what follows the last '####' on its line, as in GSM8K
    boxed         what is in the last \boxed{...}, braces within it counted
    answer_tag    what is in the last <answer>...</answer>
    phrase        what follows the last 'answer is' or 'answer:' in its sentence
    last_number   the last number of the text, wherever it stands
    whole         the text itself
    auto          whichever of the first four marks stands last; without any, there is no answer

Of a text with '</think>', only what follows the last one counts; of one that opens a thought and never closes it,
nothing does. Every rule takes time linear in the text, or nearly.
"""

import re
from collections.abc import Callable

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"

Marked = tuple[int, str]
"""Where a mark stands, and what it holds."""

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_PHRASE = re.compile(r"\banswer\s*(?:is|:|=)\s*:?", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\n|\.(?:\s|$)(?!\s*\d)")
_LAST_NUMBER = re.compile(r"(?<![\w.])-?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?%?", re.ASCII)


def extract(text: str, rule: str) -> str | None:
    """The answer in a completion, by a rule of the module's docstring; None: it has none."""
    text = after_thought(text)
    if rule == "auto":
        found = [marked for marked in (mark(text) for mark in MARKS.values()) if marked is not None]
        held: str | None = max(found)[1] if found else None
    elif rule == "whole":
        held = text
    elif rule == "last_number":
        numbers = _LAST_NUMBER.findall(text)
        held = numbers[-1] if numbers else None
    else:
        marked = MARKS[rule](text)
        held = None if marked is None else marked[1]
    return (_bare(held) or None) if held is not None else None


def after_thought(text: str) -> str:
    """What follows the last '</think>'; '' of a thought that never ends."""
    _, mark, after = text.rpartition(THINK_CLOSE)
    if mark:
        return after
    return "" if THINK_OPEN in text else text


def after_hash(text: str) -> Marked | None:
    """The rest of the line after the last '####'."""
    position = text.rfind("####")
    return None if position < 0 else (position, text[position + 4 :].lstrip(" ").partition("\n")[0])


def in_box(text: str) -> Marked | None:
    r"""The content of the last \boxed{...}; '' of one that is never closed: the answer was cut."""
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    position, begin = boxes[-1].span()
    depth = 1
    for end in range(begin, len(text)):
        if text[end] in "{}" and text[end - 1] != "\\":
            depth += 1 if text[end] == "{" else -1
        if depth == 0:
            return position, text[begin:end]
    return position, ""


def in_tag(text: str) -> Marked | None:
    """The content of the last <answer>...</answer>."""
    end = text.rfind("</answer>")
    begin = text.rfind("<answer>", 0, end) if end >= 0 else -1
    return None if begin < 0 else (begin, text[begin + len("<answer>") : end])


def after_phrase(text: str) -> Marked | None:
    """The rest of the sentence after the last 'answer is' or 'answer:'."""
    phrases = list(_PHRASE.finditer(text))
    if not phrases:
        return None
    begin = phrases[-1].end()
    end = _SENTENCE_END.search(text, begin)
    held = text[begin : end.start() if end else len(text)]
    return (phrases[-1].start(), held) if _bare(held) else None


def _bare(held: str) -> str:
    """Without white space, Markdown's emphasis and the dollars of a formula around it."""
    held = held.strip().strip("*").strip()
    if len(held) > 1 and held[0] == held[-1] == "$":
        held = held.strip("$").strip()
    return held


MARKS: dict[str, Callable[[str], Marked | None]] = {
    "hash": after_hash,
    "boxed": in_box,
    "answer_tag": in_tag,
    "phrase": after_phrase,
}

RULES = ("auto", *MARKS, "last_number", "whole")

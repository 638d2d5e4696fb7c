"""Rows of a data file, each with the place it came from.

Three formats: JSON lines, Parquet, and GSM8K's own JSON lines. Every row is yielded with its source, 'file:line'
(Parquet: 'file:row', counted from 1 as well), which travels with the prompt so that any later error can name it.
Rows are read lazily; what a key must hold is checked where the key is used, in `datasets`.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_rl.config.errors import UserError

FORMATS = ("jsonl", "parquet", "gsm8k")

Row = dict[str, Any]


class DataError(UserError):
    """A data file, or a row of it, that cannot be used."""


def read_rows(path: str | Path, format: str) -> Iterator[tuple[str, Row]]:
    """Yields (source, row) for every row of a file, in its order.

    Blank lines of JSON lines are skipped and counted. The 'gsm8k' format turns {question, answer} into {prompt,
    answer, response}: `answer` is the number after the last '####', without thousands separators, and `response` is
    the solution as the file has it, final '#### n' included.

    Raises:
        DataError: unknown format or missing file, at the call; an unreadable row or a file without rows, on iteration.
    """
    path = Path(path)
    if format not in FORMATS:
        raise DataError(f"data.format: {format!r} is unknown; allowed are {', '.join(FORMATS)}")
    if not path.is_file():
        raise DataError(f"{path}: {'is a folder, not a data file' if path.is_dir() else 'no such data file'}")
    rows = _parquet_rows(path) if format == "parquet" else _json_rows(path)
    return _not_empty(path, map(_gsm8k_row, rows) if format == "gsm8k" else rows)


def require(row: Row, key: str, source: str) -> Any:
    """row[key], or a DataError that names the keys present."""
    if key not in row:
        raise DataError(f"{source}: no key {key!r}; the row has {', '.join(map(repr, row)) or 'no keys'}")
    return row[key]


def _not_empty(path: Path, rows: Iterator[tuple[str, Row]]) -> Iterator[tuple[str, Row]]:
    count = 0
    for count, row in enumerate(rows, start=1):  # noqa: B007 (count outlives the loop)
        yield row
    if count == 0:
        raise DataError(f"{path}: the data file has no rows")


def _json_rows(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open("rb") as lines:  # bytes, so that a broken encoding is an error of its line
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            source = f"{path}:{number}"
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise DataError(f"{source}: not a line of JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"{source}: a row must be a JSON object, this is a {type(row).__name__}")
            if _HALF_PAIR.search(line):
                _check_text(row, source)
            yield source, row


_HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")
"""JSON writes characters beyond U+FFFF as two of these; one alone is no text."""


def _check_text(row: Row, source: str) -> None:
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"U+{ord(error.object[error.start]):04X}"
        raise DataError(
            f"{source}: {half} is half of a pair, as text that was cut leaves it; no tokenizer reads it"
        ) from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow  # here, because only runs on Parquet files need it
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield f"{path}:{number}", row
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: not a readable Parquet file: {reason}") from error


def _gsm8k_row(numbered: tuple[str, Row]) -> tuple[str, Row]:
    source, row = numbered
    question, solution = require(row, "question", source), require(row, "answer", source)
    if not isinstance(question, str) or not isinstance(solution, str):
        raise DataError(f"{source}: 'question' and 'answer' must be strings")
    _, mark, answer = solution.rpartition("####")
    answer = answer.strip().replace(",", "")
    if not mark or not answer:
        raise DataError(f"{source}: 'answer' does not end in '#### <number>'")
    return source, {"prompt": question, "answer": answer, "response": solution}

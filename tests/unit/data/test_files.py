"""Rows come with their place, and a bad file is named by it."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_rl.data.files import DataError, read_rows, require


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_jsonl_counts_blank_lines_but_does_not_yield_them(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"prompt": "é"}', "", '{"prompt": "b", "n": 1}', "  ")
    assert list(read_rows(path, "jsonl")) == [
        (f"{path}:1", {"prompt": "é"}),
        (f"{path}:3", {"prompt": "b", "n": 1}),
    ]


def test_jsonl_without_a_final_newline_and_with_windows_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\r\n{"a": 2}')
    assert [row["a"] for _, row in read_rows(tmp_path / "a.jsonl", "jsonl")] == [1, 2]


def test_parquet_rows_count_over_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"prompt": ["a", "b", "c"], "answer": [1, None, 3]})
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    assert list(read_rows(path, "parquet")) == [
        (f"{path}:1", {"prompt": "a", "answer": 1}),
        (f"{path}:2", {"prompt": "b", "answer": None}),
        (f"{path}:3", {"prompt": "c", "answer": 3}),
    ]


def test_gsm8k_takes_the_number_after_the_last_mark(tmp_path: Path) -> None:
    solution = "She paid #### twice.\nSo 600*2 = $<<600*2=1200>>1,200.\n#### 1,200"
    path = write(tmp_path / "a.jsonl", json.dumps({"question": "How much?", "answer": solution}))
    assert [row for _, row in read_rows(path, "gsm8k")] == [
        {"prompt": "How much?", "answer": "1200", "response": solution}
    ]


@pytest.mark.parametrize(
    ("content", "format", "message"),
    [
        ('{"a": 1}\n{"a": \n', "jsonl", ":2: not a line of JSON"),
        ('{"a": 1}\n[1, 2]\n', "jsonl", ":2: a row must be a JSON object, this is a list"),
        ("\n\n", "jsonl", "has no rows"),
        ("no parquet", "parquet", "not a readable Parquet file"),
        ('{"question": "q"}', "gsm8k", ":1: no key 'answer'; the row has 'question'"),
        ('{"question": "q", "answer": "72"}', "gsm8k", ":1: 'answer' does not end in '#### <number>'"),
        ('{"question": "q", "answer": 72}', "gsm8k", ":1: 'question' and 'answer' must be strings"),
        ("{}", "json", "data.format: 'json' is unknown; allowed are jsonl, parquet, gsm8k"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, content: str, format: str, message: str) -> None:
    path = tmp_path / "rows"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as error:
        list(read_rows(path, format))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value) or "data.format" in str(error.value)


def test_a_broken_encoding_is_an_error_of_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n{"a": "\xff"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: not a line of JSON"):
        list(read_rows(tmp_path / "a.jsonl", "jsonl"))


def test_a_missing_file_is_an_error_before_the_first_row(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such data file"):
        read_rows(tmp_path / "none.jsonl", "jsonl")
    with pytest.raises(DataError, match="is a folder"):
        read_rows(tmp_path, "jsonl")


def test_require_names_the_keys_present() -> None:
    assert require({"a": None}, "a", "f:1") is None
    with pytest.raises(DataError, match=r"^f:1: no key 'prompt'; the row has 'question', 'answer'$"):
        require({"question": 1, "answer": 2}, "prompt", "f:1")
    with pytest.raises(DataError, match="has no keys"):
        require({}, "prompt", "f:1")


@pytest.mark.parametrize("text", ["b\\ud83d", "\\udc00", "a\\uDBFFb", "\\ud83d \\ude00"])
def test_half_of_a_surrogate_pair_is_an_error_of_its_line(tmp_path: Path, text: str) -> None:
    file = write(tmp_path / "p.jsonl", '{"prompt": "\\ud83d\\ude00"}', f'{{"prompt": ["x", {{"content": "{text}"}}]}}')
    with pytest.raises(DataError, match=r"p\.jsonl:2: U\+D"):
        list(read_rows(file, "jsonl"))

"""Prompts in files of every kind: the same prompts whatever the file, and an error with its name for what is no prompt."""

import bz2
import gzip
import io
import json
import lzma

import pytest
from datasets import Dataset

from mpo_hf.cli.data_files import check_data, load_table, read_prompts_file, read_prompts_stream, with_prompts
from mpo_hf.cli.parser import UsageError


PROMPTS = ["b c", "d é"]
ROWS = [{"prompt": prompt, "x": 1} for prompt in PROMPTS]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
ASKED = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
ANSWERED = [{"messages": [*asked, {"role": "assistant", "content": "no"}]} for asked in ASKED]
TEXTS = {
    "lines.txt": "b c\r\n\nd é\n",
    "lines": "b c\nd é",
    "rows.jsonl": LINES + "\n\n",
    "rows.ndjson": LINES,
    "rows.json": json.dumps(ROWS),
    "texts.json": json.dumps(PROMPTS),
    "rows.csv": "prompt,x\nb c,1\nd é,1\n",
    "rows.tsv": "prompt\tx\nb c\t1\nd é\t1\n",
}


def write(path, text):
    openers = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    with openers.get(path.suffix, open)(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return str(path)


@pytest.mark.parametrize("name", [*TEXTS, "rows.jsonl.gz", "lines.txt.bz2", "rows.jsonl.xz", "rows.csv.gz"])
def test_prompts_of_a_file_are_those_in_it(tmp_path, name):
    text = TEXTS.get(name) or TEXTS[name.rpartition(".")[0]]
    assert read_prompts_file(write(tmp_path / name, text), None) == PROMPTS


def test_byte_order_mark_is_no_part_of_a_prompt(tmp_path):
    (tmp_path / "lines.txt").write_bytes(b"\xef\xbb\xbf" + TEXTS["lines.txt"].encode())
    assert read_prompts_file(str(tmp_path / "lines.txt"), None) == PROMPTS


def test_conversations_end_before_their_answers(tmp_path):
    for rows in (
        ANSWERED,
        [{"prompt": messages} for messages in ASKED],
        [{"prompt": row["messages"]} for row in ANSWERED],
    ):
        assert read_prompts_file(write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows))), None) == ASKED
    Dataset.from_list(ANSWERED).to_parquet(tmp_path / "rows.parquet")
    assert read_prompts_file(str(tmp_path / "rows.parquet"), "messages") == ASKED


def test_column_of_another_name(tmp_path):
    path = write(tmp_path / "rows.jsonl", LINES.replace("prompt", "question"))
    assert read_prompts_file(path, "question") == PROMPTS
    with pytest.raises(
        UsageError, match=r"Row 1 of .*rows.jsonl' has no 'prompt', it has \['question', 'x'\].*--prompt_column"
    ):
        read_prompts_file(path, None)
    with pytest.raises(UsageError, match="one prompt a line"):
        read_prompts_file(write(tmp_path / "lines.txt", "b c"), "question")


def test_stream_of_objects_is_a_table():
    assert read_prompts_stream(io.StringIO(LINES), None) == PROMPTS
    assert read_prompts_stream(io.StringIO("b c\nd é\n"), None) == PROMPTS
    assert read_prompts_stream(io.StringIO('{"a": 1}\nb c'), None) == ['{"a": 1}', "b c"]  # not all of them
    with pytest.raises(UsageError, match="--prompt_column"):
        read_prompts_stream(io.StringIO('{"question": "b"}'), None)


@pytest.mark.parametrize(
    "row, message",
    [
        ("{bad", "Line 2 .* is not JSON"),
        ('{"prompt": null}', "row 2 .* got None"),
        ('{"prompt": 3}', "row 2 .* got 3"),
        ('{"prompt": ""}', "row 2 .* got ''"),
        ('{"prompt": [1]}', r"row 2 .* got \[1\]"),
        ('{"prompt": [{"role": "assistant", "content": "x"}]}', "nothing but answers"),
        ("3", "Row 2 .* must be an object"),
    ],
)
def test_what_is_no_prompt_is_refused_with_its_place(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        read_prompts_file(write(tmp_path / "rows.jsonl", f'{{"prompt": "b c"}}\n{row}\n'), None)


def test_files_that_cannot_be_read_are_named(tmp_path):
    for name, content in {
        "latin.txt": b"caf\xe9",
        "latin.jsonl": b'{"prompt": "caf\xe9"}',
        "a.jsonl.gz": b"x",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}' is not text in UTF-8"):
            read_prompts_file(str(tmp_path / name), None)
    with pytest.raises(OSError, match="is a folder"):
        read_prompts_file(str(tmp_path), None)


# ---- tables of a fit ----


def test_data_is_checked_before_anything_is_opened(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "latin.csv").write_bytes(b"prompt\ncaf\xe9\n")
    (tmp_path / "a.docx").write_bytes(b"x")
    for name, kind, message in [
        ("missing.txt", OSError, "no file"),
        ("missing.jsonl.gz", OSError, "no file"),
        ("missing", OSError, "no file or folder"),
        ("empty.jsonl", ValueError, "is empty"),
        ("folder", ValueError, "folder .* is empty"),
        ("latin.csv", ValueError, "not text in UTF-8"),
        ("a.docx", ValueError, r"end in .json, .jsonl"),
    ]:
        with pytest.raises(kind, match=message):
            check_data("--dataset", str(tmp_path / name))
    check_data("--dataset", "org/on-the-hub")


@pytest.mark.parametrize("name", ["lines.txt", "rows.jsonl.gz", "rows.tsv"])
def test_table_has_the_rows_of_the_file(tmp_path, name):
    path = write(tmp_path / name, TEXTS.get(name, LINES))
    assert [row for row in load_table(path)["prompt"] if row] == PROMPTS


def test_folder_of_save_to_disk_is_a_table(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert load_table(str(tmp_path / "saved")).to_list() == ROWS


def test_table_that_is_none_is_named(tmp_path):
    with pytest.raises(ValueError, match="rows.jsonl' cannot be read: ."):
        load_table(write(tmp_path / "rows.jsonl", "{bad"))


def test_prompts_of_a_table_are_the_column_that_was_named():
    table = Dataset.from_list([{"question": "b", "prompt": "other"}])
    assert with_prompts(table, "t", "question")[0]["prompt"] == "b"
    assert with_prompts(table, "t", None)[0]["prompt"] == "other"
    with pytest.raises(UsageError, match=r"no column 'x', it has \['question', 'prompt'\]"):
        with_prompts(table, "t", "x")

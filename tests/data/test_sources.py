"""Text from files: what is a document, what it is called, and what is refused."""

import gzip
import json

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from groupsae.data.files import CHUNK, PIECE, FileSource
from groupsae.data.sources import PythonSource
from groupsae.runtime.errors import UserError


def documents(path, text_column="text"):
    found = list(FileSource(path=str(path), text_column=text_column).documents())
    return {d.name: d.text if d.token_ids is None else d.token_ids for d in found}


def fingerprint(path, text_column="text"):
    return FileSource(path=str(path), text_column=text_column).fingerprint()


def write(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_a_small_text_file_is_one_document(tmp_path):
    write(tmp_path, a_txt="Grüße\r\n")
    assert documents(tmp_path / "a.txt") == {"a.txt": "Grüße\r\n"}


def test_a_folder_gives_its_files_in_the_order_of_their_names(tmp_path):
    write(tmp_path, b_txt="2", a__z_md="1", c_py="3", Makefile="4")
    found = documents(tmp_path)
    assert list(found.items()) == [
        ("Makefile", "4"),
        ("a/z.md", "1"),
        ("b.txt", "2"),
        ("c.py", "3"),
    ]


def test_hidden_files_and_files_that_are_not_text_are_left_out_of_a_folder(tmp_path):
    write(tmp_path, a_txt="1", _git__config="2", image_png=b"\x89PNG\0", empty_txt="")
    assert list(documents(tmp_path)) == ["a.txt"]


def test_a_copy_of_a_file_is_read_once(tmp_path):
    write(tmp_path, b_txt="same", a_txt="same", c_txt="other")
    assert list(documents(tmp_path)) == ["a.txt", "c.txt"]


def test_names_and_fingerprint_do_not_depend_on_where_the_folder_lies(tmp_path):
    for place in ("one", "two/deep"):
        write(tmp_path / place, x__a_txt="1", b_txt="2")
    one, two = tmp_path / "one", tmp_path / "two" / "deep"
    assert documents(one) == documents(two) == documents(f"{two}/**/*.txt")
    assert fingerprint(one) == fingerprint(two)


@pytest.mark.parametrize("change", [{"a_txt": "1!"}, {"c_txt": "3"}])
def test_the_fingerprint_changes_with_the_content(tmp_path, change):
    before = fingerprint(write(tmp_path, a_txt="1", b_txt="2"))
    assert fingerprint(write(tmp_path, **change)) != before


def test_a_glob_takes_what_it_matches(tmp_path):
    write(tmp_path, x__a_txt="1", x__y__b_txt="2", x__c_md="3")
    assert list(documents(f"{tmp_path}/*/*.txt")) == ["x/a.txt"]
    assert list(documents(f"{tmp_path}/x/**/*.txt")) == ["a.txt", "y/b.txt"]


def test_a_long_file_is_cut_at_line_ends_and_nothing_is_lost(tmp_path):
    text = "".join(f"line {i} é\n" for i in range(30_000))
    write(tmp_path, long_txt=text)
    pieces = documents(tmp_path / "long.txt")
    assert list(pieces) == [f"long.txt#{i}" for i in range(len(pieces))]
    assert "".join(pieces.values()) == text
    assert all(piece.endswith("\n") for piece in pieces.values())
    assert len(pieces) == pytest.approx(len(text) / PIECE, abs=1)


def test_an_endless_line_is_cut_too(tmp_path):
    write(tmp_path, long_txt="x" * 5 * PIECE)
    pieces = documents(tmp_path)
    assert "".join(pieces.values()) == "x" * 5 * PIECE
    assert max(map(len, pieces.values())) <= 2 * PIECE


def rows(path, records):
    lines = "\n".join(json.dumps(record) for record in records).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_rows_of_json_lines_are_documents_of_text_or_tokens(tmp_path, name):
    rows(tmp_path / name, [{"text": "one"}, {"text": [1, 2]}, {"text": ""}, {"text": None}])
    assert documents(tmp_path) == {
        f"{name}#0": "one",
        f"{name}#1": [1, 2],
        f"{name}#2": [],
        f"{name}#3": [],
    }


@pytest.mark.parametrize(
    ("column", "values"), [("text", ["a", "b", None]), ("tokens", [[1, 2], [3], [4]])]
)
def test_rows_of_parquet_files_are_documents_over_all_row_groups(tmp_path, column, values):
    table = pa.table({"id": [0, 1, 2], column: values})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    expected = {f"a.parquet#{i}": value or [] for i, value in enumerate(values)}
    assert documents(tmp_path, column) == documents(tmp_path, None) == expected


@given(st.integers(0, 12))
@settings(max_examples=8)
def test_documents_can_be_entered_at_any_place(tmp_path_factory, start):
    folder = tmp_path_factory.mktemp("any")
    rows(folder / "a.jsonl", [{"text": str(i)} for i in range(5)])
    write(folder, b_txt="x" * 3 * PIECE, c_txt="c")
    source = FileSource(path=str(folder), text_column="text")
    assert list(source.documents(start)) == list(source.documents())[start:]


def refused(path, text_column="text", match=""):
    with pytest.raises(UserError, match=match):
        fingerprint(path, text_column)


def test_a_path_that_does_not_exist_is_refused(tmp_path):
    refused(tmp_path / "none.txt", match="none.txt does not exist")
    refused("", match="data.path=")


def test_a_glob_that_matches_nothing_is_refused(tmp_path):
    refused(tmp_path / "*.txt", match=r"\*\.txt matches no file")


def test_a_folder_without_text_is_refused(tmp_path):
    refused(write(tmp_path, image_png=b"\0"), match="it has 1 files, and none is")


@pytest.mark.parametrize("before", [0, 10, CHUNK - 1, CHUNK, CHUNK + 5])
@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (b"\0", "a NUL byte"),
        (b"\xff", "invalid UTF-8"),
        (b"\xc3(", "invalid UTF-8"),
        (b"\xe2\x82", "invalid UTF-8"),
    ],
)
def test_a_file_that_is_not_text_is_refused_with_the_place(tmp_path, before, bad, what):
    write(tmp_path, a_txt=b"x" * before + bad)
    refused(tmp_path, match=f"a.txt is not text: {what} at byte {before}\\.")


def test_a_character_across_two_chunks_is_text(tmp_path):
    text = "x" * (CHUNK - 1) + "é and more\n"
    assert "".join(documents(write(tmp_path, a_txt=text)).values()) == text


def test_a_line_that_is_not_json_is_refused_with_its_number(tmp_path):
    refused(write(tmp_path, a_jsonl="nonsense\n"), match="a.jsonl:1 is not JSON")
    write(tmp_path, a_jsonl='{"text": "a"}\n\n{"text": \n')
    with pytest.raises(UserError, match="a.jsonl:3 is not JSON"):
        documents(tmp_path)
    refused(write(tmp_path, a_jsonl="[1]\n"), match="a.jsonl:1 holds list")


def test_a_missing_column_is_refused_with_those_that_there_are(tmp_path):
    rows(tmp_path / "a.jsonl", [{"id": 1, "body": "x"}])
    refused(tmp_path, match="no column named 'text'. It has: 'id', 'body'")
    refused(tmp_path, None, match="'text' or 'content' or 'tokens' or 'input_ids'")
    parquet.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", match="It has: 'body'")


def test_a_column_of_something_else_is_refused(tmp_path):
    parquet.write_table(pa.table({"text": [0.5]}), tmp_path / "a.parquet")
    refused(tmp_path, match="column 'text' is of type double")
    rows(tmp_path / "b.jsonl", [{"text": {"a": 1}}])
    with pytest.raises(UserError, match="b.jsonl:1: column 'text' holds dict"):
        documents(tmp_path / "b.jsonl")


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz"])
def test_a_truncated_file_is_refused(tmp_path, name):
    path = tmp_path / name
    if path.suffix == ".gz":
        rows(path, [{"text": str(i) * i} for i in range(50)])
    else:
        parquet.write_table(pa.table({"text": ["x"]}), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=name):
        documents(tmp_path)


@pytest.fixture
def library(tmp_path, monkeypatch):
    write(
        tmp_path,
        b_py="b",
        a_py="a",
        copy_py="a",
        odd_py=b"\xff",
        void_py=" \n",
        **{"site-packages__x_py": "x"},
    )
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    return tmp_path


@pytest.mark.usefixtures("library")
def test_the_standard_library_is_read_without_copies_and_odd_encodings():
    source = PythonSource(packages=False)
    assert [(d.name, d.text) for d in source.documents()] == [("a.py", "a"), ("b.py", "b")]
    assert list(source.documents(1)) == list(source.documents())[1:]


def test_the_python_fingerprint_is_the_one_that_existing_caches_were_made_with(library):
    source = PythonSource(packages=False)
    assert source.fingerprint().startswith("b6a22f1b09f4d29d")
    write(library, b_py="B")
    assert not source.fingerprint().startswith("b6a22f1b09f4d29d")


def test_an_interpreter_without_source_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UserError, match="no Python source found"):
        PythonSource(packages=False).fingerprint()

"""Text from files: what is a document, what it is called, and what is refused."""

import bz2
import csv
import gzip
import io
import json
import lzma

import datasets
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from groupsae.data import formats
from groupsae.data.files import CHUNK, FileSource
from groupsae.data.formats import PIECE
from groupsae.data.sources import PythonSource
from groupsae.runtime.errors import UserError


def documents(path, text_column=None):
    found = list(FileSource(path=str(path), text_column=text_column).documents())
    return {d.name: d.text if d.token_ids is None else d.token_ids for d in found}


def fingerprint(path, text_column=None):
    return FileSource(path=str(path), text_column=text_column).fingerprint()


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
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


def test_files_of_a_folder_that_are_not_text_are_left_out_and_named(tmp_path):
    late = b"x" * 2 * CHUNK + b"caf\xe9"  # one byte of Latin-1, after megabytes of text
    write(tmp_path, a_txt="1", _git__config="2", pictures__image_png=b"\x89PNG\0", empty_txt="")
    write(tmp_path, late=late, pack_tar_gz=gzip.compress(b"\0" * 99), half_gz=b"\x1f\x8b\x08")
    (tmp_path / "lost").symlink_to("nowhere")
    sentence = r"left out 5 files that are not text \(2.1 MB\): half.gz, late, lost, pack.tar.gz"
    with pytest.warns(UserWarning, match=sentence):
        assert list(documents(tmp_path)) == ["a.txt"]
    refused(tmp_path / "late", match="late is not text: .*iconv")
    refused(tmp_path / "l*", match="late is not text: .*iconv")


def test_tables_without_a_usual_column_are_left_out_of_a_folder_and_named(tmp_path):
    write(tmp_path, main_py="x", data_csv="id,x\n1,2\n", rows_json='[{"a": 1}, {"a": 2}]')
    write(tmp_path, lists_jsonl="[1]\n[2]\n", package_json='{"name": "x"}', late_py=b"# caf\xe9")
    (tmp_path / "vectors.parquet").write_bytes(parquet_of([{"text": 0.5}]))
    tables = "data.csv, lists.jsonl, rows.json, vectors.parquet"
    sentence = rf"1 file that is not text \(6 B\): late.py; 4 tables .*: {tables}; data.text_col"
    with pytest.warns(UserWarning, match=sentence):
        assert list(documents(tmp_path)) == ["main.py", "package.json"]
    refused(tmp_path, "a", match="data.csv has no column named 'a'.* 3 more files.*A glob")
    refused(tmp_path / "data.csv", match="It has: 'id', 'x'")
    refused(f"{tmp_path}/*.json*", match="lists.jsonl:1 holds list")


def test_a_long_list_of_files_that_are_left_out_is_shortened(tmp_path):
    write(tmp_path, a_txt="1", **{f"{i}_bin": b"\0" for i in range(7)})
    with pytest.warns(
        UserWarning,
        match=r"left out 7 .*: 0.bin, 1.bin, 2.bin, 3.bin, 4.bin, \.\.\.$",
    ):
        documents(tmp_path)


def test_linked_folders_are_read_once_and_loops_end(tmp_path):
    write(tmp_path / "corpus", z__b_txt="2")
    write(tmp_path / "elsewhere", deep__c_txt="3")
    (tmp_path / "corpus" / "a").symlink_to("z")  # what lies below keeps its own name
    (tmp_path / "corpus" / "y").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus" / "z" / "up").symlink_to("..")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path)
    assert documents(tmp_path / "corpus") == {"y/deep/c.txt": "3", "z/b.txt": "2"}


def test_a_name_that_is_not_utf_8_is_a_name(tmp_path):
    with open(bytes(tmp_path) + b"/caf\xe9.txt", "w") as handle:
        handle.write("x")
    assert documents(tmp_path) == {"caf\ufffd.txt": "x"}


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


def test_brackets_in_the_names_of_folders_are_no_pattern(tmp_path, monkeypatch):
    write(tmp_path / "exp[v2]" / "[old]", a_txt="1", sub__b_txt="2")
    assert documents(tmp_path / "exp[v2]" / "[old]") == {"a.txt": "1", "sub/b.txt": "2"}
    assert documents(f"{tmp_path}/exp[v2]/[old]/*.txt") == {"a.txt": "1"}
    monkeypatch.chdir(tmp_path / "exp[v2]")
    assert documents("[old]/**/*.txt") == {"a.txt": "1", "sub/b.txt": "2"}
    with pytest.raises(UserError, match="does not exist"):
        documents(f"{tmp_path}/exp[v2]/no.txt")


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


def zst(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESSED = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zst,
}


def json_lines(records):
    return "\n".join(json.dumps(record) for record in records).encode()


def csv_of(separator):
    def content(records):
        file = io.StringIO(newline="")
        writer = csv.DictWriter(file, list(records[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(records)
        return file.getvalue().encode()

    return content


def parquet_of(records):
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(records), sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


def arrow_of(kind):
    def content(records):
        table, sink = pa.Table.from_pylist(records), pa.BufferOutputStream()
        with kind(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        return sink.getvalue().to_pybytes()

    return content


TABLES = {
    "a.jsonl": json_lines,
    "A.JSONL": json_lines,
    "a.ndjson": json_lines,
    "lines.json": json_lines,
    "array.json": lambda records: json.dumps(records).encode(),
    "array.jsonl": lambda records: b"\xef\xbb\xbf" + json.dumps(records, indent=2).encode(),
    "a.csv": csv_of(","),
    "excel.csv": lambda records: b"\xef\xbb\xbf" + csv_of(";")(records),
    "a.TSV": csv_of("\t"),
    "a.parquet": parquet_of,
    "saved.arrow": arrow_of(pa.ipc.new_stream),
    "a.feather": arrow_of(pa.ipc.new_file),
}
TEXTS = ["Grüße 🙂", 'a "quote",\nand; a\ttab\r\n', "", "x" * 200_000, "last"]


@pytest.mark.parametrize("ending", COMPRESSED)
@pytest.mark.parametrize("name", TABLES)
def test_rows_of_every_table_are_documents(tmp_path, name, ending):
    content = TABLES[name]([{"id": i, "body": text} for i, text in enumerate(TEXTS)])
    name += ending
    (tmp_path / name).write_bytes(COMPRESSED[ending](content))
    expected = {f"{name}#{i}": text or [] for i, text in enumerate(TEXTS)}
    assert documents(tmp_path, "body") == documents(tmp_path / name, "body") == expected
    refused(tmp_path, match="no column named 'text' or .*It has: 'id', 'body'")


@pytest.mark.parametrize("ending", COMPRESSED)
@pytest.mark.parametrize("text", ["", "\ufeffshort é\r\n", "é line\n" * PIECE])
def test_compressed_text_is_the_text(tmp_path, ending, text):
    write(tmp_path / "plain", a_Txt=text)
    path = write(tmp_path / "packed") / f"a.Txt{ending.upper()}"
    path.write_bytes(COMPRESSED[ending](text.encode()))
    found = documents(tmp_path / "packed").items()
    expected = documents(tmp_path / "plain").items()
    assert [(name.replace(ending.upper(), ""), text) for name, text in found] == list(expected)


def test_a_text_and_its_compressed_copy_are_read_once(tmp_path):
    write(tmp_path, a_txt="same", a_txt_gz=gzip.compress(b"same"), b_xz=lzma.compress(b"same"))
    assert list(documents(tmp_path)) == ["a.txt"]


@pytest.mark.parametrize(
    "content", ['{\n "text": "x"}', '{"id": 1}', '["text"]', "[1]", "", '"text"', "[[", "{}"]
)
def test_json_that_is_no_table_is_text(tmp_path, content):
    write(tmp_path, a_json=content)
    assert documents(tmp_path) == ({"a.json": content} if content else {})
    refused(tmp_path, "body", match="data.text_column=body, but .* has no table")


def test_one_json_object_with_the_column_is_a_row(tmp_path):
    write(tmp_path, a_json='{"body": "x"}\n')
    assert documents(tmp_path, "body") == {"a.json#0": "x"}
    assert documents(tmp_path) == {"a.json": '{"body": "x"}\n'}


def test_rows_hold_text_or_tokens_or_nothing(tmp_path):
    values = ["one", [1, 2], "", None, float("nan"), [], " "]
    (tmp_path / "a.jsonl").write_bytes(json_lines([{"text": v} for v in values]))
    expected = ["one", [1, 2], [], [], [], [], " "]
    assert documents(tmp_path) == {f"a.jsonl#{i}": value for i, value in enumerate(expected)}


TOKENS = [[1, 2], [3, 4], [5, 6]]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@pytest.mark.parametrize(
    ("kind", "values"),
    [
        *[(kind, ["a", None, "é"]) for kind in (pa.string(), pa.large_string(), pa.string_view())],
        (pa.dictionary(pa.int32(), pa.string()), ["a", None, "a"]),
        *[(kind(pa.int32()), TOKENS) for kind in (pa.list_, pa.large_list, pa.list_view)],
        (pa.list_(pa.uint16(), 2), TOKENS),
        (pa.list_(pa.int64()), [[1], None, []]),
    ],
)
def test_text_and_tokens_of_every_arrow_type(tmp_path, name, kind, values):
    table = pa.table({"id": [0, 1, 2], "content": pa.array(values, kind)})
    if name == "a.parquet":
        parquet.write_table(table, tmp_path / name, row_group_size=1)
    else:
        with pa.ipc.new_stream(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
    expected = {f"{name}#{i}": value or [] for i, value in enumerate(values)}
    assert documents(tmp_path) == documents(tmp_path, "content") == expected


def test_what_is_no_character_is_replaced_and_counted(tmp_path):
    lines = ['"ok"', '"half \\ud83d of \\ud83d\\ude42"', '"\\udc00\\ud800"', "[1]"]
    write(tmp_path, a_jsonl="\n".join(f'{{"text": {line}}}' for line in lines))
    with pytest.warns(UserWarning, match="replaces half a character .* in 2 doc.* is a.jsonl#1$"):
        found = documents(tmp_path)
    assert list(found.values()) == ["ok", "half \ufffd of 🙂", "\ufffd\ufffd", [1]]


def test_bytes_of_a_parquet_file_that_are_not_utf_8_are_replaced_and_counted(tmp_path):
    raw = pa.array([b"ok", b"caf\xe9", None])
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), 3, raw.buffers())})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.warns(UserWarning, match="half a character .* in 1 doc.* is a.parquet#1$"):
        assert list(documents(tmp_path).values()) == ["ok", "caf\ufffd", []]


def test_later_rows_without_the_column_are_empty_and_counted(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        json_lines([{"text": "x"}, {"id": 1}, {"content": "y"}, {}])
    )
    with pytest.warns(UserWarning, match="2 row.* without the column 'text'.* is .*a.jsonl:2$"):
        assert list(documents(tmp_path).values()) == ["x", [], "y", []]


@given(st.integers(0, 12))
@settings(max_examples=8)
def test_documents_can_be_entered_at_any_place(tmp_path_factory, start):
    folder = tmp_path_factory.mktemp("any")
    (folder / "a.jsonl").write_bytes(json_lines([{"text": str(i)} for i in range(5)]))
    write(folder, b_txt="x" * 3 * PIECE, c_txt="c")
    source = FileSource(path=str(folder), text_column=None)
    assert list(source.documents(start)) == list(source.documents())[start:]


def refused(path, text_column=None, match=""):
    with pytest.raises(UserError, match=match):
        fingerprint(path, text_column)


def test_a_path_that_does_not_exist_is_refused(tmp_path):
    refused(tmp_path / "none.txt", match="none.txt does not exist")
    refused("", match="data.path=")


def test_a_glob_that_matches_nothing_is_refused(tmp_path):
    refused(tmp_path / "*.txt", match=r"\*\.txt matches no file")


def test_a_folder_without_text_is_refused(tmp_path):
    refused(tmp_path, match="no text in .*no files")
    refused(
        write(tmp_path, image_png=b"\0"),
        match="no text in .*left out 1 file that is not text",
    )


def test_a_path_is_checked_before_anything_is_read(tmp_path):
    FileSource(path=str(write(tmp_path, image_png=b"\0"))).check()
    for missing in ("none", "*.txt"):
        with pytest.raises(UserError, match="does not exist|matches no file"):
            FileSource(path=str(tmp_path / missing)).check()


def test_a_data_set_written_by_save_to_disk_is_for_data_hf(tmp_path):
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "a b")
    refused(tmp_path / "a b", match="use data=hf 'data.name=.*a b'")
    assert list(documents(tmp_path / "a b" / "*.arrow").values()) == [text or [] for text in TEXTS]


@pytest.mark.parametrize("before", [0, CHUNK - 1, CHUNK + 5])
@pytest.mark.parametrize("bad", [b"\0", b"\xff", b"\xc3(", b"\xe2\x82"])
def test_a_file_that_is_not_text_is_refused(tmp_path, before, bad):
    write(tmp_path, a_txt=b"x" * before + bad)
    refused(tmp_path, match="a.txt is not text: .*iconv")


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
    (tmp_path / "a.jsonl").write_bytes(json_lines([{"id": 1, "body": "x"}]))
    refused(tmp_path, "text", match="no column named 'text'. It has: 'id', 'body'")
    refused(tmp_path, match="'text' or 'content' or 'tokens' or 'input_ids'")
    parquet.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", match="It has: 'body'")


def test_a_column_of_something_else_is_refused(tmp_path):
    parquet.write_table(pa.table({"text": [0.5]}), tmp_path / "a.parquet")
    refused(tmp_path, match="column 'text' holds float")
    for value in ({"a": 1}, 5, True, [[1]], [True], [1.0], [1, None], [2**63]):
        (tmp_path / "b.jsonl").write_bytes(json_lines([{"text": value}]))
        with pytest.raises(UserError, match="b.jsonl:1: column 'text' holds"):
            documents(tmp_path / "b.jsonl")


@pytest.mark.parametrize("ending", ["", *COMPRESSED])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.arrow"])
def test_a_truncated_file_is_refused(tmp_path, name, ending):
    content = TABLES.get(name.replace("a.arrow", "saved.arrow"), json_lines)(
        [{"text": str(i) * i} for i in range(500)]
    )
    if not ending and name == "a.txt":
        return  # complete as far as anybody can know
    path = tmp_path / (name + ending)
    path.write_bytes(COMPRESSED[ending](content)[:-20])
    with pytest.raises(UserError, match=f"{name}.*(is damaged or truncated|is not JSON)"):
        documents(tmp_path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            'id,text\n1,"a\nb"\n2,c,d\n',
            r"ends at .*a.csv:4 has 3 fields.*first line has 2, .* ','",
        ),
        ("id,text\n1,a\nb\n", "a.csv:3 has 1 fields"),
        ('id,text\n1,"a" b\n', "a.csv:2 is not csv"),
        ('id,text\n1,"a\n', "a.csv:2 is not csv"),
    ],
)
def test_a_csv_that_is_torn_is_refused_with_the_line(tmp_path, content, sentence):
    write(tmp_path, a_csv=content)
    with pytest.raises(UserError, match=sentence):
        documents(tmp_path)


@pytest.mark.parametrize("content", ['[{"text": "a"}, {"text": ', '[{"text": "a"}, oops]'])
def test_an_array_that_is_not_json_is_refused_with_the_place(tmp_path, content):
    write(tmp_path, a_json=content)
    with pytest.raises(UserError, match="a.json is not JSON .*char "):
        documents(tmp_path)


def test_arrays_on_several_lines_are_refused(tmp_path):
    write(tmp_path, chats_jsonl='[{"content": "hi"}]\n[{"content": "ho"}]\n')
    with pytest.raises(UserError, match="chats.jsonl is not JSON .Extra data: line 2"):
        documents(tmp_path)


def test_all_files_that_cannot_be_read_are_counted_at_once(tmp_path):
    refused(
        write(tmp_path, a_txt=b"\xff", b_txt=b"\xff", c_txt=b"\0", d_txt="x"),
        match="a.txt.* 2 more",
    )


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@given(st.lists(ANY_TEXT, min_size=1), st.sampled_from([None, 1]))
def test_any_array_is_read(tmp_path_factory, texts, indent):
    path = tmp_path_factory.mktemp("any") / "a.json"
    records = [{"id": i, "text": text} for i, text in enumerate(texts)]
    path.write_text(json.dumps(records, indent=indent, ensure_ascii=False), encoding="utf-8")
    assert [d.text or "" for d in formats.read("a", path, None)] == texts


@given(st.lists(ANY_TEXT, min_size=1), st.sampled_from(",;\t|"))
def test_any_csv_is_read_as_it_was_written(tmp_path_factory, texts, separator):
    path = tmp_path_factory.mktemp("any") / "a.csv"
    path.write_bytes(csv_of(separator)([{"id": i, "text": t} for i, t in enumerate(texts)]))
    assert [d.text or "" for d in formats.read("a", path, None)] == texts


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "", []),
        ("a.csv", "text\r\n", []),
        ("a.csv", "\n\ntext\n\nb", ["b"]),
        ("a.csv", "\ufefftext\r\n\r\na\r\n", ["a"]),
        ("a.jsonl", "", []),
        ("a.jsonl", '\ufeff{"text": "a"}\r\n\r\n{"text": "b"}', ["a", "b"]),
        ("a.json", '\n{"text": "a"}\n\n{"text": "b"}\n', ["a", "b"]),
        ("a.json", '\r\n [\r\n {"text": "a"}\r\n]\r\n', ["a"]),
    ],
)
def test_blank_lines_and_marks_of_byte_order_are_no_rows(tmp_path, name, content, expected):
    write(tmp_path).joinpath(name).write_bytes(content.encode())
    assert list(documents(tmp_path).values()) == expected


def test_an_empty_array_has_no_rows(tmp_path):
    assert documents(write(tmp_path, a_json=" [ ]\n"), "body") == {}


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

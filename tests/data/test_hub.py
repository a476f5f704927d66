"""Data sets through `datasets`: from a folder, and over a connection that breaks."""

import time

import datasets
import pyarrow as pa
import pytest
from huggingface_hub import constants
from pyarrow import parquet

from groupsae.data.hub import HubSource
from groupsae.runtime.errors import UserError

TEXTS = [f"text {i}" for i in range(7)]


def source(name, **changes):
    values = {"config": None, "split": "train", "revision": None, "column": None, "retries": 2}
    return HubSource(name=str(name), **(values | changes))


@pytest.fixture(autouse=True)
def hub_with_a_known_name(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there


@pytest.fixture(params=["saved", "saved with splits", "parquet files", "jsonl.zst"])
def folder(request, tmp_path):
    data = datasets.Dataset.from_dict({"id": list(range(7)), "text": TEXTS})
    place = tmp_path / "data"
    if request.param == "saved":
        data.save_to_disk(place)
    elif request.param == "saved with splits":
        datasets.DatasetDict({"train": data, "test": data}).save_to_disk(place)
    elif request.param == "jsonl.zst":
        place.mkdir()
        with pa.CompressedOutputStream(place / "train.jsonl.zst", "zstd") as file:
            file.write("".join(f'{{"id": 1, "text": "{text}"}}\n' for text in TEXTS).encode())
    else:
        place.mkdir()
        for part in (0, 1):
            table = pa.table({"text": TEXTS[part * 4 : part * 4 + 4]})
            parquet.write_table(table, place / f"train-{part}.parquet")
    return place


@pytest.mark.parametrize("start", [0, 3, 6, 7, 20])
def test_rows_of_a_folder_are_documents_from_any_row_on(folder, start):
    found = [(d.name, d.text) for d in source(folder).documents(start)]
    assert found == [(f"train#{i}", text) for i, text in enumerate(TEXTS)][start:]


def test_the_fingerprint_of_a_folder_is_its_content_and_not_its_place(folder, tmp_path):
    before = source(folder).fingerprint()
    moved = folder.rename(tmp_path / "elsewhere")
    assert source(moved).fingerprint() == before
    assert source(moved, column="text").fingerprint() != before
    assert source(moved, split="test").fingerprint() != before
    (moved / "more.txt").write_text("x")
    assert source(moved).fingerprint() != before


@pytest.mark.parametrize("column", ["tokens", "input_ids"])
def test_tokenised_rows_keep_their_tokens(tmp_path, column):
    datasets.Dataset.from_dict({column: [[1, 2], [], [3]]}).save_to_disk(tmp_path / "data")
    found = [d.token_ids for d in source(tmp_path / "data").documents()]
    assert found == [[1, 2], [], [3]]


@pytest.mark.parametrize("place", ["saved", "parquet files"])
@pytest.mark.parametrize("column", [None, "text"])
def test_other_columns_are_not_decoded(tmp_path, place, column):
    features = datasets.Features({"sound": datasets.Audio(), "text": datasets.Value("string")})
    sounds = pa.array([{"bytes": b"no sound", "path": "a.mp3"}] * 7, features["sound"].pa_type)
    table = datasets.table.InMemoryTable(pa.table({"sound": sounds, "text": TEXTS}))
    data = datasets.Dataset(table, info=datasets.DatasetInfo(features=features))
    (tmp_path / "data").mkdir()
    if place == "saved":
        data.save_to_disk(tmp_path / "data")
    else:
        data.to_parquet(tmp_path / "data" / "train.parquet")
    found = [d.text for d in source(tmp_path / "data", column=column).documents(2)]
    assert found == TEXTS[2:]


@pytest.mark.parametrize("kind", ["numpy", "torch", "pandas"])
def test_rows_saved_in_another_format_are_read(tmp_path, kind):
    tokens = [[1, 2], [3], [4]]
    data = datasets.Dataset.from_dict({"input_ids": tokens, "id": [0, 1, 2]})
    data.with_format(kind, columns=["id"]).save_to_disk(tmp_path / "data")
    assert [d.token_ids for d in source(tmp_path / "data").documents()] == tokens


def test_a_missing_column_is_refused_with_those_that_there_are(folder):
    with pytest.raises(UserError, match="no column named 'body'. It has: .*'text'.*data.column="):
        next(source(folder, column="body").documents())


def test_a_missing_split_is_refused_with_those_that_there_are(tmp_path):
    data = datasets.Dataset.from_dict({"text": TEXTS})
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match="no split 'dev'; it has: train, test"):
        next(source(tmp_path / "saved", split="dev").documents())
    (tmp_path / "files").mkdir()
    parquet.write_table(pa.table({"text": TEXTS}), tmp_path / "files" / "train.parquet")
    with pytest.raises(UserError, match="split: dev.*train"):
        next(source(tmp_path / "files", split="dev").documents())


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    for read in ("check", "fingerprint"):
        with pytest.raises(UserError, match="none is no folder"):
            getattr(source(tmp_path / "none"), read)()
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(UserError, match="is a file: use data=files data.path=.*a.jsonl"):
        source(tmp_path / "a.jsonl").check()


def broken(monkeypatch, breaks, error=ConnectionError):
    """Let the stream break before each of the given rows, once for each time it is listed."""
    breaks, pauses = list(breaks), []

    def rows(_self, start):
        for row in range(start, len(TEXTS)):
            if row in breaks:
                breaks.remove(row)
                raise error("gone")
            yield {"text": TEXTS[row]}

    monkeypatch.setattr(HubSource, "_open", rows)
    monkeypatch.setattr(time, "sleep", pauses.append)
    return pauses


def test_a_lost_connection_is_taken_up_again_at_the_same_row(monkeypatch):
    pauses = broken(monkeypatch, [0, 3, 3, 5])
    assert [d.text for d in source("some/data").documents()] == TEXTS
    assert pauses == [1, 1, 2, 1]


def test_after_the_retries_the_error_names_how_to_resume(monkeypatch):
    pauses = broken(monkeypatch, [3, 3, 3])
    stream, found = source("some/data").documents(), []
    with pytest.raises(UserError, match="row 3 in 3 tries .*same command resumes"):
        found.extend(d.text for d in stream)
    assert found == TEXTS[:3]
    assert pauses == [1, 2]


def test_an_error_that_stays_is_not_tried_again(monkeypatch):
    pauses = broken(monkeypatch, [3], error=FileNotFoundError)
    with pytest.raises(
        UserError, match="cannot read data set some/data, config None, split 'train'.*gone"
    ):
        list(source("some/data").documents())
    assert pauses == []

"""Text from the Hub over connections that fail, stall and are cut short: no row lost, none twice.

The real `datasets` and huggingface_hub read from a server on this machine.
"""

import time

import datasets
import httpx2
import pytest
from huggingface_hub import constants, hf_hub_download

from groupsae.data.hub import HubSource
from groupsae.data.packing import Packing, pack
from groupsae.runtime.errors import UserError
from tests.helpers.data_hub import closed, cut, files_of, serving, short, silent, status, stuck
from tests.helpers.lms import frozen

TEXTS = [f"text {i} " + "x" * (i % 300) for i in range(500)]


@pytest.fixture
def pauses(monkeypatch):
    """Let nobody wait; return what they would have waited."""
    waited, sleep = [], time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: (waited.append(seconds), sleep(0.001)))
    return waited


@pytest.fixture
def serve(monkeypatch, pauses):
    """Return a function that serves files and gives the source that reads them."""
    opened = []

    def start(files, retries=2):
        opened.append(serving(files))
        hub = opened[-1].__enter__()
        for module, name, value in (
            (constants, "ENDPOINT", hub.url),
            (constants, "HF_HUB_OFFLINE", False),
            (constants, "HF_HUB_DISABLE_XET", True),
            (datasets.config, "HF_ENDPOINT", hub.url),
            (
                constants,
                "HUGGINGFACE_CO_URL_TEMPLATE",
                hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            ),
        ):
            monkeypatch.setattr(module, name, value)
        return hub, HubSource(
            name="some/data",
            config=None,
            split="train",
            revision=None,
            column=None,
            retries=retries,
        )

    yield start
    for each in opened:
        each.__exit__(None, None, None)


def texts(source, start=0):
    return [document.text for document in source.documents(start)]


@pytest.mark.parametrize(
    ("form", "troubles"),
    [
        (
            "parquet",
            [status(500), closed, None, cut, status(503), None, short, closed, cut, short],
        ),
        ("jsonl", [closed, status(502), short, cut, None, status(429), short, closed]),
        ("jsonl.gz", [None, cut, closed, status(500), None, cut, status(504)]),
    ],
)
def test_no_row_is_lost_and_none_comes_twice(serve, form, troubles):
    hub, source = serve(files_of(TEXTS, form))
    hub.troubles = list(troubles)
    assert texts(source) == TEXTS
    assert len(hub.troubles) < 2  # they happened


@pytest.mark.parametrize("form", ["parquet", "jsonl.gz"])
def test_a_server_that_says_no_more_is_left(serve, monkeypatch, form):
    hub, source = serve(files_of(TEXTS, form))
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    hub.troubles = [None, silent, stuck, None, stuck]
    began = time.monotonic()
    assert texts(source) == TEXTS
    assert time.monotonic() - began < 30


def test_by_itself_a_silent_server_is_left_after_a_while():
    assert 0 < constants.HF_HUB_DOWNLOAD_TIMEOUT <= 60
    assert 0 < constants.HF_HUB_ETAG_TIMEOUT <= 60


@pytest.mark.parametrize("code", [429, 503])
def test_what_the_server_asks_for_is_waited(serve, pauses, code):
    hub, source = serve(files_of(TEXTS, "jsonl"))
    hub.troubles = [None, status(code, Retry_After="17")]
    assert texts(source) == TEXTS
    assert sum(pauses) >= 17


def test_the_corpus_is_the_undisturbed_one_over_a_stop(serve, tmp_path, tiny_lm, pauses):
    """Retries are used up in the middle, the command is given again, trouble continues."""
    tokenizer = frozen(tiny_lm).tokenizer()
    packing = Packing(
        context=16,
        heldout_fraction=0.1,
        calibration_fraction=0.1,
        prepend_bos=False,
        max_tokens=None,
    )

    def packed(source, place):
        folder = pack(source, tokenizer, packing, place, "key", 512)
        return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}

    hub, source = serve(files_of(TEXTS, "parquet"), retries=1)
    whole = packed(source, tmp_path / "whole")
    hub.down = {max(hub.files)}
    del pauses[:]
    with pytest.raises(UserError, match=r"at row 250 in 2 tries.*Packed text is kept.*resumes"):
        packed(source, tmp_path / "broken")
    assert sum(pauses) < 200, "the user hears of it within minutes"
    assert any((tmp_path / "broken").glob("*.partial"))
    hub.down, hub.troubles = set(), [status(500), None, short, cut]
    assert packed(source, tmp_path / "broken") == whole


def test_a_hub_out_of_reach_is_a_sentence(serve, monkeypatch):
    _, source = serve(files_of(TEXTS, "jsonl"), retries=1)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}",
    )
    with pytest.raises(UserError, match=r"failed at row 0 in 2 tries"):
        texts(source)


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_a_file_cut_in_the_middle_is_no_end_of_the_data(serve, form):
    files = files_of(TEXTS, form)
    last = max(files)
    files[last] = files[last][: len(files[last]) // 2 + 7]
    _, source = serve(files, retries=1)
    found = []
    with pytest.raises(UserError, match=r"in 2 tries.*kept.*max_tokens"):
        found.extend(document.text for document in source.documents())
    assert found == TEXTS[: len(found)]


def test_fewer_rows_than_the_card_names_are_no_end_of_the_data(serve):
    files = files_of(TEXTS, "jsonl")
    last = max(files)
    files[last] = files[last].rsplit(b"\n", 3)[0] + b"\n"  # two rows are gone, at a line's end
    card = "dataset_info: {splits: [{name: train, num_examples: 500, num_bytes: 1}]}"
    _, source = serve({**files, "README.md": f"---\n{card}\n---\n".encode()}, retries=1)
    found = []
    with pytest.raises(UserError, match=r"in 2 tries .*ended after 498 of the 500 rows"):
        found.extend(document.text for document in source.documents())
    assert found == TEXTS[:498]


def test_the_fingerprint_follows_the_commit_and_not_the_branch(serve):
    hub, source = serve(files_of(TEXTS, "jsonl"))
    before = source.fingerprint()
    source.revision = "main"
    assert source.fingerprint() == before
    source.revision = hub.sha
    hub.calls.clear()
    assert source.fingerprint() == before
    assert hub.calls == []  # a complete commit needs no question
    source.revision, hub.sha = None, "b" * 40
    assert source.fingerprint() != before


def test_without_network_the_fingerprint_is_that_of_the_commit_seen_last(
    serve, monkeypatch, tmp_path
):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    hub, source = serve({**files_of(TEXTS, "jsonl"), "README.md": b"A card."})
    before = source.fingerprint()
    hf_hub_download("some/data", "README.md", repo_type="dataset")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    assert source.fingerprint() == before
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    assert source.fingerprint() != before


def test_a_connection_lost_in_a_models_download_is_a_sentence(monkeypatch, tiny_lm):
    def lost(*_args, **_kwargs):
        raise httpx2.ReadTimeout("the server at https://me:secret@hub.org says nothing")

    monkeypatch.setattr("groupsae.lm.load.AutoConfig.from_pretrained", lost)
    with pytest.raises(UserError, match="connection failed.*downloaded parts are kept") as raised:
        frozen(tiny_lm)
    assert "secret" not in str(raised.value)

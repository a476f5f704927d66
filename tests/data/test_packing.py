"""The token cache: the right blocks, complete or not at all, also after a kill."""

import json
import multiprocessing
import os
import shutil
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.pretraining.model import train_tokenizer
from groupsae.data import packing as packing_module
from groupsae.data.copies import Contents
from groupsae.data.packing import (
    SPLITS,
    Packing,
    TokenBlocks,
    load_token_blocks,
    split_of,
    tokenizer_fingerprint,
)
from groupsae.data.sources import Document
from groupsae.runtime.errors import UserError

TEXT = "def add(first, second):\n    return first + second\n\nprint(add(1, 2))\n"


class ListSource:
    """Documents from memory, with something that may happen before one of them."""

    def __init__(self, documents, before=None):
        self.all, self.before = documents, before or {}

    def fingerprint(self):
        return "list"

    def documents(self, start=0):
        for number in range(start, len(self.all)):
            self.before.get(number, lambda: None)()
            yield self.all[number]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], vocab_size=290, context=8)


def make_packing(**changes):
    values = {
        "context": 8,
        "heldout_fraction": 0.2,
        "calibration_fraction": 0.2,
        "prepend_bos": False,
        "max_tokens": None,
    }
    return Packing(**(values | changes))


TEXTS = [Document(f"file {i}", f"number = {i}\n" * (i % 7 + 1)) for i in range(60)]


def naive_blocks(documents, tokenizer, packing):
    """Tokenise one by one, without copies, join, cut: what the cache has to hold."""
    streams, total, seen = {split: [] for split in SPLITS}, 0, []
    for name, text, ids in documents:
        if (text, ids) in seen:
            continue
        seen.append((text, ids))
        if ids is None:
            ids = tokenizer.backend_tokenizer.encode(text).ids + [tokenizer.eos_token_id]
        if packing.max_tokens is not None:
            ids = ids[: packing.max_tokens - total]
        total += len(ids)
        streams[split_of(name, packing.heldout_fraction, packing.calibration_fraction)] += ids
    body = packing.context - packing.prepend_bos
    bos = [tokenizer.bos_token_id] * packing.prepend_bos
    return {
        split: [bos + ids[i : i + body] for i in range(0, len(ids) - body + 1, body)]
        for split, ids in streams.items()
    }


def as_lists(blocks):
    return {split: blocks.blocks[split].tolist() for split in SPLITS}


def test_a_tokenizer_of_bert_begins_blocks_with_cls_and_closes_documents_with_sep(
    tokenizer, tmp_path
):
    kind = type(tokenizer)
    bert = kind(tokenizer_object=tokenizer.backend_tokenizer, cls_token="d", sep_token="e")
    assert bert.bos_token_id is bert.eos_token_id is None
    packing = make_packing(prepend_bos=True, heldout_fraction=0.0, calibration_fraction=0.0)
    blocks = load_token_blocks(ListSource(TEXTS), bert, packing, tmp_path).blocks["train"]
    assert (blocks[:, 0] == bert.cls_token_id).all()
    texts = [bert(d.text, add_special_tokens=False)["input_ids"] for d in TEXTS]
    joined = [token for ids in texts for token in [*ids, bert.sep_token_id]]
    assert blocks[:, 1:].flatten().tolist() == joined[: blocks[:, 1:].size]


@pytest.mark.parametrize("prepend_bos", [False, True])
@pytest.mark.parametrize("max_tokens", [None, 700])
def test_blocks_are_the_joined_tokens_of_each_split(tokenizer, tmp_path, prepend_bos, max_tokens):
    packing = make_packing(prepend_bos=prepend_bos, max_tokens=max_tokens)
    blocks = load_token_blocks(ListSource(TEXTS), tokenizer, packing, tmp_path)
    assert as_lists(blocks) == naive_blocks(TEXTS, tokenizer, packing)


lists = st.lists(st.lists(st.integers(0, 289), max_size=30), min_size=1, max_size=30)


@given(lists, st.integers(2, 9), st.booleans(), st.none() | st.integers(1, 200))
@settings(max_examples=15)
def test_any_tokenised_documents_are_packed_as_the_naive_way_does(
    tokenizer, tmp_path_factory, ids, context, prepend_bos, max_tokens
):
    documents = [Document(str(i), token_ids=value) for i, value in enumerate(ids)]
    packing = make_packing(
        heldout_fraction=0.0,
        calibration_fraction=0.0,
        context=context,
        prepend_bos=prepend_bos,
        max_tokens=max_tokens,
    )
    expected = naive_blocks(documents, tokenizer, packing)
    folder = tmp_path_factory.mktemp("any")
    blocks = load_token_blocks(ListSource(documents), tokenizer, packing, folder)
    assert as_lists(blocks) == expected


def test_a_document_longer_than_the_models_context_gives_no_warning(tokenizer, tmp_path, capfd):
    assert tokenizer.model_max_length == 8
    load_token_blocks(ListSource(TEXTS), tokenizer, make_packing(), tmp_path)
    assert "longer than" not in capfd.readouterr().err


def test_a_tokenizer_without_backend_gives_the_same_tokens(tokenizer, monkeypatch):
    fast = list(packing_module.token_ids(TEXTS, tokenizer))
    monkeypatch.setattr(packing_module, "getattr", lambda *_: None, raising=False)
    assert list(packing_module.token_ids(TEXTS, tokenizer)) == fast


def test_a_packed_corpus_is_not_read_again(tokenizer, tmp_path):
    first = load_token_blocks(ListSource(TEXTS), tokenizer, make_packing(), tmp_path)
    silent = ListSource([])
    assert as_lists(load_token_blocks(silent, tokenizer, make_packing(), tmp_path)) == (
        as_lists(first)
    )


def test_a_token_that_has_changed_is_noticed(tokenizer, tmp_path, monkeypatch):
    """Another valid token would train other weights, silently."""

    def refused(*_):
        raise PermissionError(13, "Permission denied")

    folder = load_token_blocks(ListSource(TEXTS), tokenizer, make_packing(), tmp_path).folder
    file = folder / "train.bin"
    whole = file.read_bytes()
    tokens = np.frombuffer(whole, np.int32).copy()
    tokens[3] ^= 1
    file.write_bytes(tokens.tobytes())
    with pytest.raises(UserError, match=r"checksum of train\.bin is wrong.*delete that folder"):
        TokenBlocks(folder)
    with monkeypatch.context() as patch:
        patch.setattr(packing_module, "checksum", refused)
        with pytest.raises(UserError, match="cannot read .*: Permission denied"):
            TokenBlocks(folder)
    file.unlink()
    with pytest.raises(UserError, match=r"damaged \(train\.bin is missing\)"):
        TokenBlocks(folder)


def test_nothing_but_the_corpus_is_left_in_the_cache(tokenizer, tmp_path):
    blocks = load_token_blocks(ListSource(TEXTS), tokenizer, make_packing(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [blocks.key]
    assert {p.name for p in blocks.folder.iterdir()} == {
        "manifest.json",
        "train.bin",
        "calibration.bin",
        "heldout.bin",
    }


def test_the_key_is_the_one_that_existing_caches_were_made_with(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("groupsae.data.packing.tokenizer_fingerprint", lambda *_: "rules")
    blocks = load_token_blocks(ListSource(TEXTS), tokenizer, make_packing(), tmp_path)
    assert blocks.key == "1dcd712a4696cbf3"


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def small_steps(monkeypatch):
    """Flush and tokenise in small portions, so that sixty documents make many of both."""
    monkeypatch.setattr(packing_module, "FLUSH_TOKENS", 100)
    monkeypatch.setattr(packing_module, "BATCH_DOCUMENTS", 4)


def undisturbed(tokenizer, packing, folder):
    blocks = load_token_blocks(ListSource(TEXTS), tokenizer, packing, folder / "undisturbed")
    return files(blocks.folder)


def lose_connection():
    raise UserError("connection lost")


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("max_tokens", [None, 2000])
@pytest.mark.parametrize("prepend_bos", [False, True])
def test_going_on_after_an_error_gives_the_same_bytes(
    tokenizer, tmp_path, max_tokens, prepend_bos
):
    packing = make_packing(max_tokens=max_tokens, prepend_bos=prepend_bos)
    cache = tmp_path / "cache"
    for number in (0, 9, 30, 31):
        interrupted = ListSource(TEXTS, {number: lose_connection})
        with pytest.raises(UserError, match="connection lost"):
            load_token_blocks(interrupted, tokenizer, packing, cache)
    blocks = load_token_blocks(ListSource(TEXTS), tokenizer, packing, cache)
    assert files(blocks.folder) == undisturbed(tokenizer, packing, tmp_path)


# From Python 3.12 on, fork warns where threads run; these children only read and write files.
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def pack_in_child(source, tokenizer, packing, cache):
    load_token_blocks(source, tokenizer, packing, cache)


def start_child(*arguments):
    child = multiprocessing.get_context("fork").Process(target=pack_in_child, args=arguments)
    child.start()
    return child


@forks
@pytest.mark.usefixtures("small_steps")
def test_going_on_after_a_kill_gives_the_same_bytes(tokenizer, tmp_path):
    cache = tmp_path / "cache"
    killed = ListSource(TEXTS, {40: lambda: os._exit(9)})
    child = start_child(killed, tokenizer, make_packing(), cache)
    child.join()
    assert child.exitcode == 9
    (partial,) = cache.glob("*.partial")
    with (partial / "train.bin").open("ab") as handle:
        handle.write(b"half a flush")
    already = json.loads((partial / "progress.json").read_text())["documents"]
    reads = []
    again = ListSource(TEXTS, {i: (lambda i=i: reads.append(i)) for i in range(60)})
    blocks = load_token_blocks(again, tokenizer, make_packing(), cache)
    assert files(blocks.folder) == undisturbed(tokenizer, make_packing(), tmp_path)
    assert reads[0] == already > 0


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("damage", ["note is half", "file is short", "note of older code"])
def test_a_damaged_beginning_is_packed_again(tokenizer, tmp_path, damage):
    cache = tmp_path / "cache"
    with pytest.raises(UserError):
        load_token_blocks(
            ListSource(TEXTS, {40: lose_connection}), tokenizer, make_packing(), cache
        )
    (partial,) = cache.glob("*.partial")
    note = partial / "progress.json"
    if damage == "note is half":
        note.write_text(note.read_text()[:50])
    elif damage == "file is short":
        (partial / "train.bin").write_bytes(b"")
    else:
        note.write_text(json.dumps({"documents": 3, "tokens": {}, "rest": {}}))
    blocks = load_token_blocks(ListSource(TEXTS), tokenizer, make_packing(), cache)
    assert files(blocks.folder) == undisturbed(tokenizer, make_packing(), tmp_path)


@pytest.mark.usefixtures("small_steps")
def test_a_disk_that_was_full_for_a_while_spoils_nothing(tokenizer, tmp_path, monkeypatch):
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) in (6, 7):  # in the middle of a flush, and in the last try
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    cache = tmp_path / "cache"
    with pytest.raises(UserError, match="cannot write .*: No space left"):
        load_token_blocks(ListSource(TEXTS), tokenizer, make_packing(), cache)
    blocks = load_token_blocks(ListSource(TEXTS), tokenizer, make_packing(), cache)
    assert files(blocks.folder) == undisturbed(tokenizer, make_packing(), tmp_path)


@forks
def test_a_second_process_waits_and_takes_what_the_first_one_packed(tokenizer, tmp_path, capfd):
    cache = tmp_path / "cache"
    slow = ListSource(TEXTS, {30: lambda: time.sleep(0.7)})
    child = start_child(slow, tokenizer, make_packing(), cache)
    while not list(cache.glob("*.partial")):
        time.sleep(0.01)
    unread = ListSource(TEXTS, {0: lose_connection})
    blocks = load_token_blocks(unread, tokenizer, make_packing(), cache)
    child.join()
    assert child.exitcode == 0
    assert files(blocks.folder) == undisturbed(tokenizer, make_packing(), tmp_path)
    assert "another process is packing this text" in capfd.readouterr().err


@pytest.mark.parametrize("damage", ["short", "long", "missing", "half a manifest"])
def test_a_damaged_cache_is_noticed(tokenizer, tmp_path, damage):
    folder = load_token_blocks(ListSource(TEXTS), tokenizer, make_packing(), tmp_path).folder
    train, manifest = folder / "train.bin", folder / "manifest.json"
    if damage == "short":
        train.write_bytes(train.read_bytes()[:-4])
    elif damage == "long":
        train.write_bytes(train.read_bytes() + b"1234")
    elif damage == "missing":
        train.unlink()
    else:
        manifest.write_text(manifest.read_text()[:40])
    with pytest.raises(UserError, match="are damaged .* delete that folder"):
        load_token_blocks(ListSource(TEXTS), tokenizer, make_packing(), tmp_path)
    shutil.rmtree(folder)
    load_token_blocks(ListSource(TEXTS), tokenizer, make_packing(), tmp_path)


def test_a_folder_without_manifest_is_no_cache(tokenizer, tmp_path):
    folder = load_token_blocks(ListSource(TEXTS), tokenizer, make_packing(), tmp_path).folder
    whole = files(folder)
    (folder / "manifest.json").unlink()
    again = load_token_blocks(ListSource(TEXTS), tokenizer, make_packing(), tmp_path)
    assert files(again.folder) == whole


def test_a_cache_that_cannot_be_written_is_refused(tokenizer, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write .*file"):
        load_token_blocks(ListSource(TEXTS), tokenizer, make_packing(), tmp_path / "file" / "c")


def test_an_empty_source_is_refused(tokenizer, tmp_path):
    with pytest.raises(UserError, match="text source has no document"):
        load_token_blocks(ListSource([]), tokenizer, make_packing(), tmp_path)


@pytest.mark.parametrize("token_id", [290, 2**40, -1])
def test_tokens_of_another_tokenizer_are_refused(tokenizer, tmp_path, token_id):
    documents = [Document("a", token_ids=[1] * 100), Document("b", token_ids=[2, token_id])]
    for _ in range(2):  # the second time it is no copy of the first
        with pytest.raises(UserError, match=f"'b' holds the token id {token_id}, .* ends at 289"):
            load_token_blocks(ListSource(documents), tokenizer, make_packing(), tmp_path)


def test_the_vocabulary_of_the_model_is_what_counts(tokenizer, tmp_path):
    packing = make_packing(heldout_fraction=0.0, calibration_fraction=0.0)
    source = ListSource([Document("a", token_ids=[310] * 8)])
    load_token_blocks(source, tokenizer, packing, tmp_path, vocab_size=320)
    with pytest.raises(UserError, match="packed corpus .* token id 310"):
        load_token_blocks(source, tokenizer, packing, tmp_path, vocab_size=305)


def test_bos_is_refused_where_the_tokenizer_has_none(tmp_path):
    tokenizer = train_tokenizer([TEXT], vocab_size=290, context=8)
    tokenizer.bos_token = None
    with pytest.raises(UserError, match="no BOS token"):
        load_token_blocks(ListSource(TEXTS), tokenizer, make_packing(prepend_bos=True), tmp_path)


def test_reading_ahead_is_bounded_in_number_and_size():
    many = [Document("", "x")] * 150
    large = [Document("", "x" * 700_000)] * 5
    assert [len(batch) for batch in packing_module.batches(many)] == [64, 64, 22]
    assert [len(batch) for batch in packing_module.batches(large)] == [2, 2, 1]


def test_the_tokenizers_fingerprint_follows_its_vocabulary(tokenizer):
    other = train_tokenizer([TEXT * 2 + "other words"], vocab_size=310, context=8)
    same = train_tokenizer([TEXT], vocab_size=290, context=8)
    assert tokenizer_fingerprint(same) == tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)


# ---- the key ----------------------------------------------------------------------------------


def with_ends(tokenizer, **special):
    """Return a tokenizer with the same rules, which know two ends, and other special tokens."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens(["<|im_end|>"])
    return type(tokenizer)(tokenizer_object=backend, **special)


def test_tokenizers_that_differ_only_in_their_end_of_text_share_no_text(tokenizer, tmp_path):
    base = with_ends(tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    instruct = with_ends(tokenizer, eos_token="<|im_end|>", bos_token="<|endoftext|>")
    assert base.backend_tokenizer.to_str() == instruct.backend_tokenizer.to_str()
    first, second = (
        load_token_blocks(ListSource(TEXTS), each, make_packing(), tmp_path)
        for each in (base, instruct)
    )
    assert first.key != second.key
    for blocks, end, other in ((first, 0, 290), (second, 290, 0)):
        assert (blocks.blocks["train"] == end).any()
        assert not (blocks.blocks["train"] == other).any()


def test_what_begins_a_block_is_in_the_key_where_there_is_one(tokenizer):
    base = with_ends(tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    other = with_ends(tokenizer, eos_token="<|endoftext|>", bos_token="<|im_end|>")
    assert tokenizer_fingerprint(base, False) == tokenizer_fingerprint(other, False)
    assert tokenizer_fingerprint(base, True) == tokenizer_fingerprint(base, False)
    assert tokenizer_fingerprint(base, True) != tokenizer_fingerprint(other, True)


def test_special_tokens_that_are_read_as_text_are_in_the_key(tokenizer):
    plain = with_ends(tokenizer, eos_token="<|endoftext|>", split_special_tokens=True)
    usual = with_ends(tokenizer, eos_token="<|endoftext|>")
    assert tokenizer_fingerprint(plain) != tokenizer_fingerprint(usual)


def test_the_options_of_a_tokenizer_without_backend_are_in_the_key(tokenizer, monkeypatch):
    monkeypatch.setattr(packing_module, "getattr", lambda *_: None, raising=False)
    other = with_ends(tokenizer, eos_token="<|im_end|>")
    same = with_ends(tokenizer, eos_token="<|im_end|>", name_or_path="moved")
    lower = with_ends(tokenizer, eos_token="<|im_end|>", do_lower_case=True)
    assert tokenizer_fingerprint(other) == tokenizer_fingerprint(same)
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(lower)


# ---- copies -----------------------------------------------------------------------------------

# every text again under another name, and the first ones a third time
COPIED = [
    *TEXTS,
    *(document._replace(name=f"copy of {document.name}") for document in TEXTS),
    *(document._replace(name=f"again {document.name}") for document in TEXTS[:5]),
]


def test_copies_are_dropped_and_counted(tokenizer, tmp_path, capfd):
    blocks = load_token_blocks(ListSource(COPIED), tokenizer, make_packing(), tmp_path)
    assert as_lists(blocks) == naive_blocks(TEXTS, tokenizer, make_packing())
    assert blocks.manifest["documents"] == len(TEXTS)
    assert blocks.manifest["copies"] == len(COPIED) - len(TEXTS)
    assert f"{len(COPIED) - len(TEXTS)} copies dropped" in capfd.readouterr().err
    again = load_token_blocks(ListSource([]), tokenizer, make_packing(), tmp_path)
    assert again.folder == blocks.folder


@pytest.mark.usefixtures("small_steps")
def test_copies_are_dropped_alike_after_every_interruption(tokenizer, tmp_path):
    packing, cache = make_packing(), tmp_path / "cache"
    for number in (0, 9, 30, 61, 70, 121):
        interrupted = ListSource(COPIED, {number: lose_connection})
        with pytest.raises(UserError, match="connection lost"):
            load_token_blocks(interrupted, tokenizer, packing, cache)
    blocks = load_token_blocks(ListSource(COPIED), tokenizer, packing, cache)
    straight = load_token_blocks(ListSource(COPIED), tokenizer, packing, tmp_path / "straight")
    assert files(blocks.folder) == files(straight.folder)


def test_tokenised_copies_are_dropped_and_empty_documents_are_none(tokenizer, tmp_path):
    rows = [[1, 2, 3, 4, 5, 6, 7, 8], [], [8] * 8, [1, 2, 3, 4, 5, 6, 7, 8], []]
    source = ListSource([Document(str(i), token_ids=ids) for i, ids in enumerate(rows)])
    packing = make_packing(heldout_fraction=0.0, calibration_fraction=0.0)
    blocks = load_token_blocks(source, tokenizer, packing, tmp_path)
    assert blocks.blocks["train"].tolist() == [rows[0], rows[2]]
    assert (blocks.manifest["documents"], blocks.manifest["copies"]) == (4, 1)


def test_a_text_without_copies_keeps_its_key_and_one_with_copies_gets_another(tokenizer, tmp_path):
    packing = make_packing()
    distinct = load_token_blocks(ListSource(TEXTS), tokenizer, packing, tmp_path / "a")
    key = distinct.key
    copied = load_token_blocks(ListSource(COPIED), tokenizer, packing, tmp_path / "b")
    assert copied.key != key
    assert distinct.manifest["copies"] == 0


@given(st.lists(st.lists(st.integers(0, 2**64 - 1), max_size=9), max_size=9))
def test_contents_are_new_once_also_in_another_process(tmp_path_factory, portions):
    file = tmp_path_factory.mktemp("contents") / "contents.bin"
    file.touch()
    known, contents = set(), Contents(file, 0)
    for portion in portions:
        for content in portion:
            assert contents.add(content) == (content not in known)
            known.add(content)
        contents.flush()
        contents = Contents(file, contents.count)
    assert contents.count == len(known)


# ---- a tokenizer that is none -----------------------------------------------------------------


def unknown_only():
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "[EOS]": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", eos_token="[EOS]", name_or_path="some/folder"
    )


def empty():
    backend = Tokenizer(models.BPE({"<|endoftext|>": 0}, []))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def one_token():
    backend = Tokenizer(models.WordLevel({"?": 0, "[EOS]": 1}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[EOS]")


def test_a_block_must_have_room_for_text():
    with pytest.raises(UserError, match="context=1 leaves no room for text after BOS"):
        make_packing(context=1, prepend_bos=True)


@pytest.mark.parametrize("make", [unknown_only, empty, one_token])
def test_text_is_refused_where_the_tokenizer_makes_nothing_of_it(tmp_path, make):
    with pytest.raises(UserError, match=r"cannot read this text.*Copy tokenizer.json and"):
        load_token_blocks(ListSource(TEXTS), make(), make_packing(), tmp_path, vocab_size=300)


@pytest.mark.parametrize("make", [unknown_only, empty])
def test_tokens_need_no_tokenizer(tmp_path, make):
    tokens = [Document(str(i), token_ids=[*range(i, i + 9), 1]) for i in range(90)]
    blocks = load_token_blocks(ListSource(tokens), make(), make_packing(), tmp_path, 300)
    assert blocks.manifest["documents"] == 90


def test_a_tokenizer_of_another_model_is_named(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"'file 0' holds .*the model's own tokenizer files"):
        load_token_blocks(ListSource(TEXTS), tokenizer, make_packing(), tmp_path, vocab_size=20)


def test_text_without_an_end_is_packed_with_a_note(tokenizer, tmp_path, capfd):
    endless = with_ends(tokenizer)
    blocks = load_token_blocks(ListSource(TEXTS), endless, make_packing(), tmp_path)
    assert "no end-of-text token" in capfd.readouterr().err
    assert not (blocks.blocks["train"] == 0).any()

"""A run keeps to the text and the model that it began with, or is refused."""

import json
import shutil

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from groupsae.data import activations, packing
from groupsae.runtime.errors import UserError
from tests.helpers.evaluated import evaluate
from tests.helpers.hub_stand_in import ask, serving
from tests.helpers.lms import frozen
from tests.helpers.runs import overrides, run

pytestmark = pytest.mark.slow


def test_a_run_is_refused_with_another_end_of_text(tiny_lm, tiny_text, tmp_path):
    lm = shutil.copytree(tiny_lm, tmp_path / "lm")
    backend = AutoTokenizer.from_pretrained(lm).backend_tokenizer
    backend.add_special_tokens(["~"])  # an end as good as the first one

    def save(end):
        tokenizer = Tokenizer.from_str(backend.to_str())
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end).save_pretrained(lm)

    save("<|endoftext|>")
    arguments = overrides(lm, tiny_text, tmp_path / "runs")
    folder = run(arguments)[1]
    assert json.loads((folder / "groups.json").read_text())["copies"] == 0
    save("~")
    with pytest.raises(UserError, match="were trained on packed text .* but data now gives"):
        evaluate(folder)
    with pytest.raises(UserError, match="was made with other values of text"):
        run(arguments)
    save("<|endoftext|>")
    evaluate(folder)


def test_a_run_of_an_earlier_version_keeps_its_copies(tiny_lm, tiny_text, tmp_path, monkeypatch):
    texts = [file.read_text() for file in sorted(tiny_text.glob("*.txt"))]
    text = tmp_path / "twice.jsonl"
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in [*texts, *texts[:40]]))

    def earlier(source, tokenizer, how, cache, vocab_size, earlier_key):
        parts = [1, source.fingerprint(), packing._digest_of(packing._rules(tokenizer)), vars(how)]
        key = packing._digest(parts)[:16]
        return packing.load_token_blocks(source, tokenizer, how, cache, vocab_size, key)

    arguments = overrides(tiny_lm, text, tmp_path / "runs")
    with monkeypatch.context() as patch:
        patch.setattr(activations, "load_token_blocks", earlier)
        folder = run(arguments)[1]
    for file in (folder / "groups.json", *folder.glob("saes/*/cfg.json")):
        values = json.loads(file.read_text())
        assert values.pop("copies") is None  # earlier versions did not have the key
        file.write_text(json.dumps(values))
    before = json.loads((folder / "groups.json").read_text())["measured"]["text"]
    assert evaluate(folder)["text"] == before
    assert run(arguments) == (0, folder)  # confirms that it is finished
    new = run(overrides(tiny_lm, text, tmp_path / "runs", "seed=1"))[1]
    assert json.loads((new / "groups.json").read_text())["copies"] == 40
    assert evaluate(new)["text"] != before


def test_a_run_is_refused_when_its_model_on_the_hub_has_moved(
    tiny_lm, tiny_text, tmp_path, monkeypatch
):
    files = {file.name: file.read_bytes() for file in tiny_lm.iterdir()}
    with serving() as hub:
        ask(hub, monkeypatch, tmp_path)
        hub.repos["me/lm"] = []
        hub.commit("me/lm", files)
        stored = f"data.cache={tmp_path / 'store'}"
        arguments = overrides("me/lm", tiny_text, tmp_path / "runs", stored)
        folder = run(arguments)[1]
        evaluate(folder)
        assert len(list((tmp_path / "store").iterdir())) == 1
        hub.commit("me/lm", {**files, "README.md": b"moved"})
        with pytest.raises(UserError, match="were trained on other weights of me/lm"):
            evaluate(folder)
        with pytest.raises(UserError, match="was made with other values of weights"):
            run(arguments)
        run([*arguments, "seed=1"])
        assert len(list((tmp_path / "store").iterdir())) == 2
        assert len(list((tmp_path / "runs" / "cache" / "angles").glob("*.npz"))) == 2
        # as an earlier version recorded it: by the name of the branch
        key = frozen("me/lm").earlier_fingerprint()
        for file in folder.glob("saes/*/cfg.json"):
            file.write_text(json.dumps({**json.loads(file.read_text()), "weights": key}))
        evaluate(folder)


def test_what_an_earlier_version_measured_and_stored_is_used_while_the_branch_stays(
    tiny_lm, tiny_text, tmp_path, monkeypatch
):
    files = {file.name: file.read_bytes() for file in tiny_lm.iterdir()}
    with serving() as hub:
        ask(hub, monkeypatch, tmp_path)
        hub.repos["me/lm"] = []
        hub.commit("me/lm", files)
        stored = f"data.cache={tmp_path / 'store'}"
        arguments = overrides("me/lm", tiny_text, tmp_path / "runs", stored)
        frozen("me/lm")  # the branch's commit is known before
        with monkeypatch.context() as patch:
            kind = type(frozen("me/lm"))
            patch.setattr(kind, "fingerprint", kind.earlier_fingerprint)
            folder = run(arguments)[1]
        assert run(arguments) == (0, folder)
        run([*arguments, "seed=1"])
        assert len(list((tmp_path / "store").iterdir())) == 1
        assert len(list((tmp_path / "runs" / "cache" / "angles").glob("*.npz"))) == 1
        hub.commit("me/lm", {**files, "README.md": b"moved"})
        run([*arguments, "seed=2"])
        assert len(list((tmp_path / "store").iterdir())) == 2
        assert len(list((tmp_path / "runs" / "cache" / "angles").glob("*.npz"))) == 2

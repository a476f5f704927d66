"""A run keeps to the text and the model that it began with, or is refused."""

import json
import shutil

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from groupsae.runtime.errors import UserError
from tests.helpers.evaluated import evaluate
from tests.helpers.hub_stand_in import ask, serving
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

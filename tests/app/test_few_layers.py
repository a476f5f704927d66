"""Models of one layer and of two train, are evaluated and reported."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.pretraining.model import build_gpt_neox
from groupsae.reporting.page import write_report
from groupsae.runtime.errors import UserError
from tests.helpers.runs import overrides, run


@pytest.fixture(scope="module")
def lm_of(tmp_path_factory: pytest.TempPathFactory, tiny_lm: Path):
    def build(num_layers: int) -> Path:
        folder = tmp_path_factory.mktemp(f"layers-{num_layers}")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            build_gpt_neox(
                num_layers=num_layers, d_model=32, num_heads=4, vocab_size=512, context=64
            ).save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((tiny_lm / name).read_bytes())
        return folder

    return build


ALL = ["groups=all", "groups.rules=[complete,minmax,even,published]"]


@pytest.mark.parametrize(
    ("num_layers", "last_layer", "given", "saes"),
    [
        (1, "group", [*ALL, "calibration.centring=mean"], [[0]]),
        (2, "own", ALL, [[0], [1]]),
        (2, "group", ["groups=count", "groups.num_groups=1"], [[0, 1]]),
    ],
)
def test_few_layers_are_trained_evaluated_and_reported(
    lm_of, tiny_text, tmp_path, num_layers, last_layer, given, saes
):
    more = [*given, f"groups.last_layer={last_layer}", "evaluate=true", "evaluation.tokens=1024"]
    status, folder = run(overrides(lm_of(num_layers), tiny_text, tmp_path, *more))
    assert status == 0
    assert json.loads((folder / "groups.json").read_text())["plan"]["saes"] == saes
    page = write_report([folder])
    drawn = {file.stem for file in page.parent.glob("*.png")}
    assert {"fvu_layers", "density", "training"} <= drawn
    for figures in (drawn, {file.stem for file in (folder / "figures").glob("*.png")}):
        # one layer has no distances, and one layer to group no choice
        assert ("distances" in figures) == (num_layers > 1)
        assert ({"amad", "dendrogram"} <= figures) == (last_layer == "group" and num_layers > 1)


@pytest.mark.parametrize("groups", ["amad", "all", "per_layer", "published"])
def test_one_layer_that_is_kept_out_of_the_groups_is_one_sentence(
    lm_of, tiny_text, tmp_path, groups
):
    with pytest.raises(UserError, match=r"1 layer .* last_layer is own.*groups.last_layer=group"):
        run(overrides(lm_of(1), tiny_text, tmp_path, f"groups={groups}"))

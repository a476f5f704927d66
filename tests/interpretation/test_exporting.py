"""Pages for other tools: what they hold is what the exported SAE does, and their readers take it.

The tests with `sae-dashboard` and with Neuronpedia's client run where these are installed:
pip install --no-deps sae-dashboard==0.8.0 neuronpedia==1.2.1 python-dotenv
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file

from groupsae.config.instantiate import CONF
from groupsae.export import export as command
from groupsae.interop.library import fold_norm_factor
from groupsae.interpretation.bands import BANDS
from groupsae.interpretation.files import Interpretation
from groupsae.runtime.errors import UserError
from groupsae.suite.suite import load_suite
from tests.helpers.interpreted import (
    BLOCKS,
    CONTEXT,
    SILENT,
    STRINGS,
    Interpreted,
    explain,
    interpreted_run,
)
from tests.helpers.neuronpedia import DEFS, Imported, check, upload_server
from tests.helpers.shelf import D_SAE, FACTORS

ROOT = Path(__file__).parents[2]
FORMATS = ("saedashboard", "neuronpedia")
LONG = "`def` after " + "𝒳" * 600  # characters that count twice in JavaScript
EXPLAINED = {3: "</script> and \0 and " + r"\u0000 and \\u0000", 5: LONG}


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> Interpreted:
    """A run, interpreted and explained, with both exports in its folder `export`."""
    found = interpreted_run(tmp_path_factory.mktemp("interpreted") / "run")
    explain(found.run, EXPLAINED, layers=[1])
    for form in FORMATS:
        export(found.run, f"format={form}")
    return found


def export(run: Path, *arguments: str) -> None:
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        command(compose("export", [f"run={run}", *arguments]))


def dashboards(run: Path) -> dict[int, tuple[list[dict], dict]]:
    """Return the batches and the skipped indexes of each layer."""
    found = {}
    for folder in (run / "export" / "saedashboard").iterdir():
        files = sorted(folder.glob("batch-*.json"))
        batches = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        skipped = json.loads((folder / "skipped_indexes.json").read_text(encoding="utf-8"))
        assert len(list(folder.iterdir())) == len(files) + 1
        found[batches[0]["layer"]] = batches, skipped
    return found


def sources(run: Path) -> list[Path]:
    return sorted((run / "export" / "neuronpedia").glob("*/*"))


@pytest.fixture(scope="module")
def imported(interpreted) -> Imported:
    database = Imported()
    for folder in sources(interpreted.run):
        database.add(folder)
    return database


def exported_acts(interpreted: Interpreted, layer: int) -> np.ndarray:
    """Return the latents of the layer's exported SAE on raw activations, [token, d_sae]."""
    suite, x = load_suite(str(interpreted.run)), interpreted.acts[layer]
    with torch.no_grad():
        latents = fold_norm_factor(suite.saes[suite.group_of(layer)], FACTORS[layer]).encode(x)
    return torch.zeros(len(x), D_SAE).scatter(1, latents.indices, latents.acts).numpy()


# ---- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_density_maximum_and_values_are_those_of_the_exported_sae(interpreted, layer):
    z = exported_acts(interpreted, layer)
    batches, skipped = dashboards(interpreted.run)[layer]
    features = {each["feature_index"]: each for batch in batches for each in batch["features"]}
    assert SILENT in skipped["skipped_indexes"]
    assert sorted([*features, *skipped["skipped_indexes"]]) == list(range(D_SAE))
    assert not z[:, skipped["skipped_indexes"]].any()
    collected = Interpretation.of(interpreted.run / "interpretation").saes[
        "layers.3" if layer == 3 else "layers.0-1"
    ]
    top = collected.contexts("top", layer)
    for latent, feature in features.items():
        own = z[:, latent]
        assert feature["frac_nonzero"] == pytest.approx((own > 0).mean(), rel=1e-12)
        ours = feature["activations"]
        of_top = [each for each in ours if each["bin_contains"] == -1]
        assert of_top[0]["bin_max"] == pytest.approx(own.max(), rel=1e-5)
        assert {(each["bin_min"], each["bin_max"]) for each in of_top} == {
            (-1, of_top[0]["bin_max"])
        }
        assert max(of_top[0]["values"]) == pytest.approx(own.max(), rel=1e-5)
        assert max(max(each["values"]) for each in ours) <= max(of_top[0]["values"])
        for rank, each in enumerate(of_top):
            start = top.starts[latent, rank]
            window = own[start : start + len(each["values"])]
            np.testing.assert_allclose(each["values"], window, rtol=1e-3, atol=1e-5)
            peak = each["qualifying_token_index"]
            assert each["values"][peak] == pytest.approx(window[peak], rel=1e-5)
            tokens = interpreted.tokens.flatten()[start : start + len(window)].tolist()
            assert each["tokens"] == [STRINGS[token] or f"<{token}>" for token in tokens]


@pytest.mark.parametrize("layer", [0, 3])
def test_histograms_have_centres_and_counts_of_the_exported_latents(interpreted, layer):
    z = exported_acts(interpreted, layer)
    for batch in dashboards(interpreted.run)[layer][0]:
        for feature in batch["features"]:
            own = z[:, feature["feature_index"]]
            centres = np.array(feature["freq_hist_data_bar_values"])
            heights = feature["freq_hist_data_bar_heights"]
            width = 2 * centres[0]
            assert heights[-1] > 0
            assert sum(heights) == (own > 0).sum()
            edges = width * np.arange(len(centres) + 1)
            np.testing.assert_allclose(centres, (edges[:-1] + edges[1:]) / 2, rtol=1e-4)
            counts, _ = np.histogram(own[own > 0], edges * (1 + 1e-6))
            assert np.abs(counts - heights).sum() <= 2  # a value on an edge
            assert np.allclose(np.diff(feature["logits_hist_data_bar_values"]), 5 / 50, atol=1e-4)
            assert feature["logits_hist_data_bar_values"][0] == pytest.approx(-1.95, abs=1e-4)


@pytest.mark.parametrize("layer", [1, 3])
def test_bands_hold_their_contexts_and_share_out_the_density(interpreted, layer):
    z = exported_acts(interpreted, layer)
    for batch in dashboards(interpreted.run)[layer][0]:
        for feature in batch["features"]:
            own = z[:, feature["feature_index"]]
            bands = [each for each in feature["activations"] if each["bin_contains"] != -1]
            limits = {(each["bin_min"], each["bin_max"]): each["bin_contains"] for each in bands}
            for each in bands:
                peak = each["values"][each["qualifying_token_index"]]
                assert each["bin_min"] * 0.999 <= peak <= each["bin_max"] * 1.001
            if len(limits) < BANDS:  # fires in few windows
                continue
            edges = sorted({edge for pair in limits for edge in pair})
            assert edges[0] == 0
            assert len(edges) == BANDS + 1
            assert sum(limits.values()) == pytest.approx(feature["frac_nonzero"], rel=1e-9)
            for (low, high), share in limits.items():
                true = ((own > low) & (own <= high)).sum() / len(own)
                assert share == pytest.approx(true, abs=3 / len(own) + 0.2 * true)


def test_the_decoder_goes_along(interpreted):
    suite = load_suite(str(interpreted.run))
    for layer, (batches, _) in dashboards(interpreted.run).items():
        decoder = suite.saes[suite.group_of(layer)].directions().numpy()
        for feature in batches[0]["features"]:
            row = decoder[feature["feature_index"]]
            np.testing.assert_allclose(feature["vector"], row, rtol=1e-5)
            order = np.argsort(-row)[:3]
            assert feature["neuron_alignment_indices"] == order.tolist()
            share = np.abs(row[order]) / np.abs(row).sum()
            np.testing.assert_allclose(feature["neuron_alignment_l1"], share, rtol=1e-4)


# ---- SAEDashboard ---------------------------------------------------------------------------


def test_saedashboards_files_have_its_keys_and_name_layer_and_group(interpreted):
    folders = sorted((interpreted.run / "export" / "saedashboard").iterdir())
    assert [folder.name for folder in folders] == [
        f"pythia-14m_groupsae-res-48_blocks.{layer}.hook_resid_post_48_{group}"
        for layer, group in ((0, "layers-0-1"), (1, "layers-0-1"), (3, "layers-3"))
    ]
    for layer, (batches, skipped) in dashboards(interpreted.run).items():
        for batch in batches:
            check(batch, DEFS["batch"])
        check(skipped, DEFS["skipped_indexes"])
        assert skipped["layer"] == str(layer)


def test_saedashboards_own_classes_read_every_batch(interpreted):
    module = pytest.importorskip("sae_dashboard.neuronpedia.neuronpedia_dashboard")
    for batches, _ in dashboards(interpreted.run).values():
        for batch in batches:
            assert module.NeuronpediaDashboardBatch(**batch).to_dict() == batch


# ---- Neuronpedia ----------------------------------------------------------------------------


def test_the_importer_takes_every_folder(interpreted, imported):
    ids = [f"{layer}-groupsae-res-48__{group}" for layer, group in (
        (0, "layers-0-1"), (1, "layers-0-1"), (3, "layers-3"),
    )]  # fmt: skip
    assert sorted(imported.sources) == [("pythia-14m", each) for each in ids]
    assert imported.models["pythia-14m"]["layers"] == 4
    assert len(imported.releases) == len(imported.sets) == 1
    assert len(imported.neurons) == 3 * D_SAE  # the silent ones too
    source = imported.sources["pythia-14m", ids[1]]
    assert source["num_prompts"] * source["num_tokens_in_prompt"] == BLOCKS * CONTEXT
    config = source["saelensConfig"]
    assert config["metadata"]["hook_name"] == "blocks.1.hook_resid_post"
    assert config["metadata"]["groupsae"]["group"] == "layers.0-1"
    neuron = imported.neurons["pythia-14m", ids[1], "3"]
    assert neuron["hookName"] == "blocks.1.hook_resid_post"
    assert neuron["maxActApprox"] == pytest.approx(exported_acts(interpreted, 1)[:, 3].max())


def test_the_rows_of_both_formats_agree(interpreted, imported):
    lists = {}
    for row in imported.activations.values():
        lists.setdefault((row["layer"].partition("-")[0], row["index"]), []).append(row)
        assert row["maxValue"] == max(row["values"]) == row["values"][row["maxValueTokenIndex"]]
    for layer, (batches, _) in dashboards(interpreted.run).items():
        for feature in batches[0]["features"]:
            theirs = lists[str(layer), str(feature["feature_index"])]
            ours = feature["activations"]
            assert [each["values"] for each in ours] == [each["values"] for each in theirs]
            texts = [[t.replace("\0", " ") for t in each["tokens"]] for each in ours]
            assert texts == [each["tokens"] for each in theirs]


def test_text_arrives_as_it_was_but_for_nul(imported):
    seen = {token for row in imported.activations.values() for token in row["tokens"]}
    assert seen >= {text.replace("\0", " ") for text in STRINGS if text} | {"<4>"}
    assert "" not in seen
    rows = [row for row in imported.explanations.values() if "Rules" in row["notes"]]
    texts = {(row["layer"][0], row["index"]): row for row in rows}
    assert sorted(texts) == [("0", "3"), ("0", "5"), ("1", "3"), ("1", "5")]
    arrived = EXPLAINED[3].replace("\0", " ")
    assert texts["0", "3"]["description"] == arrived  # that of all layers
    assert "all layers of its group" in texts["0", "3"]["notes"]
    assert texts["1", "3"]["description"] == f"1: {arrived}"
    assert "F1 0.50 (of another latent's rules 0.10)" in texts["1", "3"]["notes"]
    others = [row for row in imported.explanations.values() if row not in rows]
    assert [(row["layer"][0], row["index"]) for row in others] == [("0", "3"), ("1", "3")]
    assert {row["description"] for row in others} == {"closing tags"}
    assert "some-llm (groupsae)" in others[0]["notes"]
    assert "detection F1 0.70 (null 0.20)" in others[0]["notes"]
    assert texts["0", "5"]["description"] == LONG[: 12 + 249] + "…"


def test_a_second_export_is_the_same_byte_for_byte(interpreted, tmp_path):
    for form in FORMATS:
        first = interpreted.run / "export" / form
        export(interpreted.run, f"format={form}", f"output={tmp_path / form}")
        files = sorted(p.relative_to(first) for p in first.rglob("*") if p.is_file())
        assert files == sorted(
            p.relative_to(tmp_path / form) for p in (tmp_path / form).rglob("*") if p.is_file()
        )
        assert all((first / f).read_bytes() == (tmp_path / form / f).read_bytes() for f in files)


def test_names_and_owner_can_be_given(interpreted, tmp_path):
    options = {"model": "my-model", "set": "mine-res", "release": "r", "creator_id": "me"}
    given = [f"neuronpedia.{key}={value}" for key, value in options.items()]
    export(interpreted.run, "format=neuronpedia", f"output={tmp_path / 'out'}", *given)
    database = Imported()
    for folder in (tmp_path / "out").glob("*/*"):
        database.add(folder)
    assert ("my-model", "3-mine-res__layers-3") in database.sources
    assert database.releases["r"]["creatorId"] == "me"


def test_the_schema_is_one(interpreted):
    jsonschema = pytest.importorskip("jsonschema")
    for name, schema in DEFS.items():
        jsonschema.Draft202012Validator.check_schema(schema)
        assert name in ("batch", "skipped_indexes") or schema["additionalProperties"] is False
    for batches, _ in dashboards(interpreted.run).values():
        jsonschema.validate(batches[0], DEFS["batch"])


def test_the_client_uploads_a_source_as_the_docs_show(interpreted, imported, monkeypatch):
    """The example of docs/formats.md, run against a server on this machine."""
    pytest.importorskip("neuronpedia")
    from neuronpedia.requests.base_request import NPRequest

    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(import gzip.*?upload_batch.*?)```", text, re.DOTALL)
    folder = sources(interpreted.run)[1]
    example = re.sub(r'Path\(".*?"\)', f'Path("{folder}")', example, count=1)
    with upload_server() as (address, received):
        monkeypatch.setattr(NPRequest, "BASE_URL", address)
        monkeypatch.setenv("NEURONPEDIA_API_KEY", "key")
        exec(compile(example, "docs/formats.md", "exec"), {})
    features = {each["index"]: each for body in received for each in body["features"]}
    assert {(body["modelId"], body["source"]) for body in received} == {
        ("pythia-160m", "4-my-group-saes")
    }
    active = {
        int(row["index"]) for row in imported.activations.values() if row["layer"] == folder.name
    }
    assert set(features) == active
    assert features[3]["explanations"][0]["text"].startswith("1: </script>")
    assert features[3]["explanations"][1]["text"] == "closing tags"
    z = exported_acts(interpreted, 1)
    for latent, feature in features.items():
        assert feature["density"] == pytest.approx((z[:, latent] > 0).mean())
        peaks = [max(each["values"]) for each in feature["activations"]]
        assert max(peaks) == pytest.approx(z[:, latent].max(), rel=1e-5)


def test_bytes_that_are_no_text_are_shown_as_bytes():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from groupsae.app.interpret import token_strings

    merges = [("â", "Ģ"), ("Ġ", "â"), ("â", "Ĥ"), ("âĤ", "¬")]
    every = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(m) for m in merges)]
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(every)}, merges))
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    numbers = {token: i for i, token in enumerate(every)}
    found = token_strings(tokenizer, {*range(len(every)), 9999})
    assert found[numbers["âĢ"]] == "<0xE2><0x80>"
    assert found[numbers["Ġâ"]] == " <0xE2>"
    assert found[numbers["âĤ¬"]] == "€"
    assert found[numbers["A"]] == "A"
    assert found[numbers["Ã"]] == "<0xC3>"
    assert found[9999] == "<9999>"


# ---- what cannot be done ------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "saedashboard exists: overwrite=true|neuronpedia exists: overwrite=true"),
        (["hub=me/pages"], "which hub=... does not upload"),
        (["neuronpedia.set=a__b"], "neuronpedia.set is 'a__b'"),
        (["'neuronpedia.model=a b'"], "neuronpedia.model is 'a b'"),
        (["output=groupsae-elsewhere", "grouping=complete-9"], "complete-9"),
    ],
)
def test_what_cannot_be_written_is_named(interpreted, form, arguments, message):
    arguments = [argument.strip("'") for argument in arguments]
    with pytest.raises(UserError, match=message):
        export(interpreted.run, f"format={form}", *arguments)


def test_a_run_that_was_not_interpreted_is_named_with_the_command(tmp_path, interpreted):
    from tests.helpers.shelf import run_folder

    run = run_folder(tmp_path / "run", "topk")
    for form in FORMATS:
        with pytest.raises(UserError, match=f"was not interpreted.*interpret run={run}"):
            export(run, f"format={form}")
    assert not (run / "export").exists()
    with pytest.raises(UserError, match="is on the Hub.*run's folder only"):
        export("hf:me/saes", "format=neuronpedia", f"output={tmp_path / 'out'}")


def test_an_interpretation_of_other_saes_is_refused(tmp_path):
    run = interpreted_run(tmp_path / "run").run
    head = run / "interpretation" / "collected" / "collected.json"
    before = json.loads(head.read_text())
    head.write_text(json.dumps({**before, "saes": before["saes"][:1]}))
    with pytest.raises(
        UserError, match="has nothing about layers.3: python -m groupsae.interpret"
    ):
        export(run, "format=neuronpedia")
    head.write_text(json.dumps(before))
    weights = run / "saes" / "layers.3" / "sae.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "W_dec": tensors["W_dec"].flip(0).contiguous()}, weights)
    with pytest.raises(UserError, match="other weights of layers.3.*overwrite=true"):
        export(run, "format=saedashboard")
    assert not (run / "export").exists()


def test_overwriting_replaces_pages_and_nothing_else(interpreted, tmp_path):
    for form, file in zip(FORMATS, ("skipped_indexes.json", "source.jsonl"), strict=True):
        target = tmp_path / form
        export(interpreted.run, f"format={form}", f"output={target}")
        export(interpreted.run, f"format={form}", f"output={target}", "overwrite=true")
        assert len(list(target.rglob(file))) == 3
        (target / "thesis").mkdir()
        (target / "thesis" / "thesis.tex").touch()
        with pytest.raises(UserError, match="files that this command does not write"):
            export(interpreted.run, f"format={form}", f"output={target}", "overwrite=true")

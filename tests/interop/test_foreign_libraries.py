"""Exported folders, loaded by the libraries they are for, compute what our suite does.

Needs those libraries, which are no dependencies of ours: each test is skipped without its own.
docs/formats.md says when they were run, with which versions, and what they found.
"""

import importlib
import json
import warnings

import pytest
import torch

from groupsae.interop.dictionary_learning import CLASSES
from groupsae.interop.formats import FORMATS
from groupsae.suite.exporting import export_suite
from groupsae.suite.suite import load_suite
from tests.helpers.shelf import FACTORS, KINDS, dense, rows, run_folder
from tests.interop.test_spellings import OLD, old

TOLERANCE = 1e-5  # of the largest value; all compute in float32

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs are not our matter


def library(name):
    """Return a module, or skip the test; what it warns of when imported is not our matter."""
    pytest.importorskip(name.split(".")[0], exc_type=ImportError)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def exported(tmp_path, kind, form):
    suite = load_suite(run_folder(tmp_path / "run", kind))
    export_suite(suite, FORMATS[form], tmp_path / "out", overwrite=False)
    return suite, tmp_path / "out"


def check(suite, layer, encode, decode, record_property):
    """Compare latents, and the reconstruction from them; note the larger difference."""
    x = rows(200) / FACTORS[layer]
    ours, theirs = suite.encode(x, layer), encode(x).detach()
    assert (ours > 0).any()
    # latents are divided by the norm factor, as the fold has it
    pairs = (
        (theirs, ours / FACTORS[layer]),
        (decode(theirs).detach(), suite.reconstruct(x, layer)),
    )
    found = [float((a - b).abs().max() / b.abs().max()) for a, b in pairs]
    record_property("largest_difference", max(found))
    assert max(found) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_saelens_loads_its_folders(tmp_path, kind, record_property):
    sae_lens = library("sae_lens")
    suite, out = exported(tmp_path, kind, "saelens")
    for layer in suite.layers:
        sae = sae_lens.SAE.load_from_disk(str(out / f"blocks.{layer}.hook_resid_post"))
        assert sae.cfg.metadata.hook_name == f"blocks.{layer}.hook_resid_post"
        assert sae.cfg.metadata.model_name == "pythia-14m"
        assert sae.cfg.metadata.groupsae["layer"] == layer
        check(suite, layer, sae.encode, sae.decode, record_property)


def test_sparsify_loads_its_folders(tmp_path, record_property):
    sparsify = library("sparsify")
    suite, out = exported(tmp_path, "topk", "sparsify")
    loaded = sparsify.SparseCoder.load_many(str(out), local=True)
    assert list(loaded) == [f"layers.{layer}" for layer in suite.layers]
    for layer in suite.layers:
        sae = loaded[f"layers.{layer}"]

        def encode(x, sae=sae):
            acts, indices, _ = sae.encode(x)
            return torch.zeros(len(x), sae.num_latents).scatter(1, indices, acts)

        def decode(latents, sae=sae):
            acts, indices = latents.topk(sae.cfg.k, dim=1)
            return sae.decode(acts, indices)

        check(suite, layer, encode, decode, record_property)


@pytest.mark.parametrize("kind", KINDS)
def test_dictionary_learning_loads_its_folders(tmp_path, kind, record_property):
    load = library("dictionary_learning.utils").load_dictionary
    suite, out = exported(tmp_path, kind, "dictionary_learning")
    for layer in suite.layers:
        sae, config = load(str(out / f"resid_post_layer_{layer}"), device="cpu")
        assert config["groupsae"]["layer"] == layer
        # (BatchTopK and Matryoshka use their threshold by default, as at inference)
        check(suite, layer, sae.encode, sae.decode, record_property)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_becomes_the_librarys_own_object(tmp_path, kind, record_property):
    """With the norm factor folded in: it takes raw activations."""
    sae_lens = library("sae_lens")
    library("dictionary_learning.utils")
    suite = load_suite(run_folder(tmp_path / "run", kind))
    for layer in suite.layers:
        theirs = suite[layer].to_saelens()
        assert isinstance(theirs, sae_lens.SAE)
        check(suite, layer, theirs.encode, theirs.decode, record_property)
        theirs = suite[layer].to_dictionary_learning()
        check(suite, layer, theirs.encode, theirs.decode, record_property)


def test_a_layer_becomes_sparsifys_own_object(tmp_path):
    sparsify = library("sparsify")
    sae = load_suite(run_folder(tmp_path / "run", "topk"))[3]
    theirs, x = sae.to_sparsify(), rows(200)
    assert isinstance(theirs, sparsify.SparseCoder)
    torch.testing.assert_close(theirs(x).sae_out, sae(x), rtol=1e-5, atol=1e-5)


def test_folders_that_saelens_wrote_are_read(tmp_path):
    """What the library itself saves, with its own initialisation (decoder norm 0.1)."""
    sae_lens = library("sae_lens")
    config = sae_lens.TopKSAEConfig(d_in=16, d_sae=48, k=5)
    config.metadata.hook_name = "blocks.2.hook_resid_post"
    theirs = sae_lens.TopKSAE(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_model(str(tmp_path / "sae"))
    found = FORMATS["saelens"].read(tmp_path / "sae")
    assert found.layers == [2]
    x = rows()
    again = found.sae.decode(found.sae.encode(x))
    torch.testing.assert_close(again, theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OLD)
def test_saelens_reads_old_keys_as_we_do(tmp_path, name):
    sae_lens = library("sae_lens")
    kind, config = OLD[name]
    folder, x = old(tmp_path / "sae", kind, **config), rows()
    theirs, ours = sae_lens.SAE.load_from_disk(str(folder)), FORMATS["saelens"].read(folder).sae
    torch.testing.assert_close(dense(ours, x), theirs.encode(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.decode(ours.encode(x)), theirs(x), rtol=1e-4, atol=1e-5)


def shaken(module):
    """Return a module of theirs with all of its parameters moved at random."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("name", [*CLASSES.values(), "AutoEncoderNew"])
def test_folders_that_dictionary_learning_wrote_are_read(tmp_path, name):
    utils = library("dictionary_learning.utils")
    more = {"k": 5} if "TopK" in name else {}
    sizes = {"group_sizes": [12, 12, 24]} if "Matryoshka" in name else {}
    theirs = shaken(getattr(utils, name)(16, 48, **more, **sizes))
    if "Batch" in name:
        theirs.threshold.fill_(0.3)
    torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    trainer = {"dict_class": name, "submodule_name": "mlp_out_layer2", "layer": 2, **more}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    found = FORMATS["dictionary_learning"].read(tmp_path)
    assert found.place[:2] == (2, "mlp_out")
    x = rows()
    again = found.sae.decode(found.sae.encode(x))
    loaded, _ = utils.load_dictionary(str(tmp_path), device="cpu")
    torch.testing.assert_close(again, loaded(x), rtol=1e-4, atol=1e-5)
    active = dense(found.sae, x) > 0
    assert active.any()
    assert torch.equal(active, loaded.encode(x) > 0)


def test_folders_that_sparsify_wrote_are_read(tmp_path):
    sparsify = library("sparsify")
    theirs = shaken(sparsify.SparseCoder(16, sparsify.SparseCoderConfig(num_latents=48, k=5)))
    folder = tmp_path / "layers.2.mlp.dense_4h_to_h"
    theirs.save_to_disk(folder)
    found = FORMATS["sparsify"].read(folder)
    assert found.place[:2] == (2, "mlp_out")
    x = rows()
    acts, indices, _ = theirs.encode(x)
    latents = torch.zeros(len(x), 48).scatter(1, indices, acts)
    torch.testing.assert_close(dense(found.sae, x), latents, rtol=1e-4, atol=1e-5)
    again = found.sae.decode(found.sae.encode(x))
    torch.testing.assert_close(again, theirs.decode(acts, indices), rtol=1e-4, atol=1e-5)

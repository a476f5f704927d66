"""Our metrics equal those of SAELens, SAEBench and dictionary_learning, run on the same numbers.

Needs those libraries, which are no dependencies of ours: each test is skipped without its own.
Run on 2026-11-25 with sae-lens 6.54.12, sae-bench 0.6.0 and dictionary-learning 0.1.0: all pass.
"""

import importlib
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from groupsae.evaluation.reconstruction import LayerSums, ReconstructionSums, layer_metrics
from groupsae.sae.base import SparseLatents

D_MODEL, D_SAE, K, POS, BLOCKS = 24, 80, 6, 32, 8
SPECIAL = 0
HOOK = "blocks.0.hook_resid_post"
TOLERANCE = 1e-6  # the others compute in float32; 1.1e-7 was the largest difference seen


def library(name):
    """Return a module, or skip the test; what it warns of when imported is not our matter."""
    pytest.importorskip(name.split(".")[0], exc_type=ImportError)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


class Foreign:
    """Stands for model, SAE, store and scaler at once: hands out fixed batches, one a call."""

    def __init__(self, batches):
        metadata = SimpleNamespace(hook_name=HOOK, hook_head_index=None)
        self.cfg = SimpleNamespace(
            metadata=metadata, d_sae=D_SAE, hook_name=HOOK, hook_head_index=None, hook_layer=0
        )
        self.device, self.dict_size, self.activation_dim = "cpu", D_SAE, D_MODEL
        self.normalize_activations = "none"
        self.batches = iter(batches)

    def get_batch_tokens(self, _):
        self.batch = next(self.batches)
        return self.batch["tokens"]

    def run_with_cache(self, tokens, **_):
        return None, {HOOK: self.batch["x"]}

    def scale(self, x):
        return x

    unscale = scale

    def encode(self, x):
        return self.batch["acts"]

    def decode(self, acts):
        return self.batch["x_hat"]

    def __next__(self):  # dictionary_learning: an iterator of activations
        self.batch = next(self.batches)
        return self.batch["x"].reshape(-1, D_MODEL)

    def __call__(self, x, output_features):  # and a dictionary
        return self.batch["x_hat"].reshape(-1, D_MODEL), self.batch["acts"].reshape(-1, D_SAE)


def batches_of(count):
    """Return batches of activations with one large constant dimension, and rough copies."""
    result = []
    for _ in range(count):
        x = torch.randn(BLOCKS, POS, D_MODEL) * torch.linspace(0.2, 3, D_MODEL)
        x[..., 5] += 20
        scores = torch.randn(BLOCKS * POS, D_SAE)
        scores[:, -4:] = -1
        values, indices = scores.topk(K)
        latents = SparseLatents((values - 1).relu(), indices)
        acts = torch.zeros(BLOCKS * POS, D_SAE).scatter(1, indices, latents.acts)
        result.append(
            {
                "x": x,
                "x_hat": 0.95 * x + 0.4 * torch.randn_like(x) + 0.1,
                "latents": latents,
                "acts": acts.reshape(BLOCKS, POS, D_SAE),
                "tokens": torch.randint(0, 6, (BLOCKS, POS)),
            }
        )
    return result


def ours(batches, exclude):
    layer, sums = LayerSums(D_MODEL), ReconstructionSums(D_MODEL, D_SAE)
    for batch in batches:
        keep = batch["tokens"] != SPECIAL if exclude else None
        layer.update(batch["x"], keep)
        sums.update(batch["x"], batch["x_hat"], batch["latents"], keep)
    return layer_metrics(layer, sums), sums


def of_the_family(module, batches, exclude, **scaler):
    """Return what SAELens or SAEBench say; SAEBench began as a copy of SAELens."""
    stub = Foreign(batches)
    metrics, per_latent = module.get_sparsity_and_variance_metrics(
        sae=stub,
        model=stub,
        activation_store=stub,
        **{name: stub for name in scaler},
        n_batches=len(batches),
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
        eval_batch_size_prompts=BLOCKS,
        model_kwargs={},
        ignore_tokens=[SPECIAL] if exclude else [],
    )
    return metrics, np.array(per_latent["feature_density"])


def equal(pairs):
    for name, (found, expected) in pairs.items():
        print(f"{name}: {found:.9f}, {abs(found / expected - 1):.1e} apart")  # noqa: T201
        assert found == pytest.approx(expected, rel=TOLERANCE), name


@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_sae_lens(count, exclude):
    evals = library("sae_lens.evals")
    batches = batches_of(count)
    found, sums = ours(batches, exclude)
    theirs, density = of_the_family(evals, batches, exclude, activation_scaler=True)
    pairs = {
        "explained_variance": (1 - found["fvu"], theirs["explained_variance"]),
        "legacy": (found["explained_variance_legacy"], theirs["explained_variance_legacy"]),
        "mse": (found["mse"], theirs["mse"]),
        "cosine": (found["cosine"], theirs["cossim"]),
        "norm_ratio": (found["norm_ratio"], theirs["l2_ratio"]),
        "l0": (found["l0"], theirs["l0"]),
    }
    if count == 1:  # theirs is a mean of ratios over batches
        pairs["relative_bias"] = found["relative_bias"], theirs["relative_reconstruction_bias"]
    equal(pairs)
    np.testing.assert_allclose(sums.fired / sums["count"].sum(), density, rtol=TOLERANCE)


@pytest.mark.parametrize("count", [1, 3])
def test_sae_bench(count):
    core = library("sae_bench.evals.core.main")
    batches = batches_of(count)
    found, _ = ours(batches, exclude=False)
    theirs, _ = of_the_family(core, batches, exclude=False)
    tokens = BLOCKS * POS  # of a batch: theirs divides by it once more
    equal(
        {
            "saebench": (found["explained_variance_saebench"], theirs["explained_variance"]),
            "legacy": (found["explained_variance_legacy"], theirs["explained_variance_legacy"]),
            "mse": (found["mse"] / tokens, theirs["mse"]),
            "cosine": (found["cosine"], theirs["cossim"]),
            "norm_ratio": (found["norm_ratio"], theirs["l2_ratio"]),
            "l0": (found["l0"], theirs["l0"]),
        }
    )


def test_dictionary_learning():
    evaluation = library("dictionary_learning.evaluation")
    batches = batches_of(1)
    found, _ = ours(batches, exclude=False)
    stub = Foreign(batches)
    theirs = evaluation.evaluate(stub, stub)
    variance = found["explained_variance_dictionary_learning"]
    equal(
        {
            "explained_variance": (variance, theirs["frac_variance_explained"]),
            "cosine": (found["cosine"], theirs["cossim"]),
            "norm_ratio": (found["norm_ratio"], theirs["l2_ratio"]),
            "relative_bias": (found["relative_bias"], theirs["relative_reconstruction_bias"]),
            "l0": (found["l0"], theirs["l0"]),
            "alive": (1 - found["dead"], theirs["frac_alive"]),
        }
    )

"""A user's script: mypy checks it (tests/test_public.py), nothing runs it."""

from pathlib import Path
from typing import Any, assert_type

import numpy as np
import torch

import groupsae

run = groupsae.train(["model=tiny", "groups=count", "groups.num_groups=3"])
assert_type(run, groupsae.TrainedRun)
assert_type(run.folder, Path)
assert_type(run.summary, dict[str, Any])
assert_type(run.suite, groupsae.Suite)
groupsae.train({"model": "tiny", "stream": {"context": 128}})
groupsae.train(3)  # type: ignore[arg-type]

suite = groupsae.Suite.from_pretrained("owner/name", device="cpu")
model, tokenizer = suite.load_model()
sae = suite[5]
assert_type(sae, groupsae.LayerSAE)
assert_type(sae.encode(torch.zeros(1, 8)), torch.Tensor)
with suite.capture(model, layers=[3, 5]) as cache:
    model(**tokenizer("def f(self):", return_tensors="pt"))
assert_type(cache[5].acts, torch.Tensor)
with suite.splice(model, layers=[5], error=False), suite.steer(model, 5, latent=17, scale=4.0):
    pass
suite.steer(model, "five")  # type: ignore[arg-type]

found = groupsae.evaluate(suite, model, ["a text"], tokens=1000)
groupsae.evaluate(run)
groupsae.evaluate(suite, model, texts=3)  # type: ignore[arg-type]
distances = groupsae.angular_distances(model, tokenizer, ["a text"])
assert_type(groupsae.choose(distances), groupsae.Partition)
assert_type(groupsae.partition(np.zeros((3, 3)), num_groups=2).groups, list[list[int]])
assert_type(groupsae.amad(distances, [[0, 1], [2]]), float)
groupsae.TopK(d_model=768, d_sae=12288, k=64).to("cpu")
groupsae.Matryoshka(d_model=768, expansion=16, k=64, prefixes=[0.5, 1])
groupsae.ReLU(d_modle=768, d_sae=12288)  # type: ignore[call-arg]
groupsae.TopK(d_model=768, d_sae=12288)  # type: ignore[call-arg]
print(groupsae.nothing)  # type: ignore[attr-defined]

try:
    groupsae.load_suite("nowhere")
except groupsae.UserError as error:
    assert_type(str(error), str)

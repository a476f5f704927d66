"""The source of notebook.md, in cells that Jupyter (with jupytext), VS Code and PyCharm open.

`make notebook` runs it in a kernel and writes the page.
"""

# %% [markdown]
# # In a notebook
#
# From nothing to a steered generation, with the bundled model and text: no network, no account,
# less than a minute on two CPU cores. Everything on this page was run by `make notebook`.
#
# ## Train
#
# `groupsae.train` takes the arguments of the command, as a list or a dict. These make the run of
# the [README](../README.md) small: 80,000 tokens instead of a million, in larger steps.

# %%
import groupsae

run = groupsae.train(
    {
        "model": "tiny",
        "groups": "amad",
        "tokens": 80_000,
        "calibration.tokens": 16_000,
        "stream.heldout_tokens": 8_192,
        "stream.max_tokens": 2_000_000,
        "stream.blocks_per_step": 8,
        "callbacks": "none",
    }
)

# %% [markdown]
# The call gives the run: `run.folder`, `run.summary`, and `run.suite`, the SAEs. The same call
# again returns the finished run at once, and resumes an interrupted one.

# %%
run.suite

# %% [markdown]
# ## The layers, and their groups
#
# The language model that the SAEs were trained on, and a text that they have not seen: the source
# of another package.

# %%
import inspect

import rich.console
import rich.table
import rich.text

model, tokenizer = run.suite.load_model()
texts = [inspect.getsource(module) for module in (rich.console, rich.table, rich.text)]

# %% [markdown]
# `angular_distances` works with any Hugging Face model. Distances are fractions of pi: 0 is the
# same direction, 0.5 is orthogonal. The last layer has an SAE of its own, so it is left out of the
# choice.

# %%
distances = groupsae.angular_distances(model, tokenizer, texts, tokens=8_192)
chosen = groupsae.choose(distances[:-1, :-1], theta=0.2)
chosen.groups, round(chosen.amad, 3)

# %%
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

figure, axes = plt.subplots(figsize=(4.5, 3.6))
image = axes.imshow(distances, cmap="viridis")
for group in chosen.groups:
    corner, size = (group[0] - 0.5, group[0] - 0.5), len(group)
    axes.add_patch(Rectangle(corner, size, size, fill=False, color="white", linewidth=2))
axes.set(xlabel="layer", ylabel="layer", title="angles between layers, and the chosen groups")
figure.colorbar(image, label="fractions of π")
plt.show()

# %% [markdown]
# ## What the SAEs cost the model
#
# `evaluate` replaces the activations of one layer at a time by their reconstruction, with 95 %
# intervals over documents. `groupsae.evaluate(run)` does what the command does, on the held-out
# text of the run.

# %%
found = groupsae.evaluate(run.suite, model, texts, tokens=4_096)
found[["sae", "layer", "fvu", "fvu_low", "fvu_high", "l0", "delta_ce"]].round(3)

# %% [markdown]
# ## One latent
#
# `capture` collects activations and latents while the model runs. Which latents are active on
# ` self`, at layer 5?

# %%
layer = 5
code = inspect.getsource(rich.table.Table.__init__).partition("-> None:")[2]
inputs = tokenizer(code, return_tensors="pt", truncation=True, max_length=256)
with run.suite.capture(model, layers=[layer], tokenizer=tokenizer) as cache:
    model(**inputs)
active = cache[layer].active()
on_self = active[active["token"].str.strip() == "self"]
counts = on_self["latent"].value_counts()
shares = (counts / active["latent"].value_counts()).rename("of all its tokens").round(2)
often = counts[counts > counts.max() / 2].rename("times on self").to_frame().join(shares)
often.sort_values("of all its tokens", ascending=False).head()

# %% [markdown]
# The most selective one of those that are often active there, on the text around its strongest
# tokens:

# %%
latent = int(often["of all its tokens"].idxmax())
values = cache[layer].latents[0, :, latent]
tokens = [tokenizer.decode([token]) for token in inputs["input_ids"][0]]
places = values.topk(40).indices
starts = sorted({int(place) // 12 * 12 for place in places})[:6]
figure, axes = plt.subplots(figsize=(8, 2.2))
for row, start in enumerate(starts):
    x = 0.0
    for token, value in zip(tokens[start : start + 12], values[start : start + 12], strict=False):
        shade = float(value / values.max())
        text = axes.text(
            x,
            -row,
            repr(token)[1:-1],
            family="monospace",
            fontsize=8,
            bbox={"facecolor": (1, 0.6, 0), "alpha": shade, "pad": 1.5, "linewidth": 0},
        )
        x += 0.011 * len(text.get_text()) + 0.012
axes.set(xlim=(0, 1), ylim=(-len(starts) + 0.4, 0.8), title=f"latent {latent} of layer {layer}")
axes.axis("off")
plt.show()

# %% [markdown]
# What happens to the loss without the latents that are active on `self`? `steer` changes latents
# and keeps the SAE's error, so nothing else changes.

# %%
clean = model(**inputs, labels=inputs["input_ids"]).loss
with run.suite.steer(model, layer=layer, ablate=on_self["latent"].unique()):
    ablated = model(**inputs, labels=inputs["input_ids"]).loss
print(f"{clean:.3f} nats, without these latents {ablated:.3f}")

# %% [markdown]
# ## Steer
#
# A latent by what it does: the one whose direction favours one of the texts' usual words over all
# other tokens the most, read off through the model's unembedding.

# %%
from collections import Counter

layer = 10
sae = run.suite[layer]
seen = Counter(token for text in texts for token in tokenizer(text, verbose=False)["input_ids"])
words = [token for token, n in seen.items() if n > 9 and tokenizer.decode(token)[1:].isalpha()]
effects = sae.direction(range(sae.d_sae)) @ model.get_output_embeddings().weight.T
effects = (effects - effects.mean(1, keepdim=True)) / effects.std(1, keepdim=True)
latent = int(effects[:, words].max(1).values.argmax())
latent, [tokenizer.decode(token) for token in effects[latent].topk(5).indices]

# %% [markdown]
# `scale` is in units of the latent's own values; a scale of 1 adds `direction(latent)`, which
# is `W_dec[latent]` divided by the layer's norm factor, to the residual stream.

# %%
prompt = tokenizer("class ", return_tensors="pt")
options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
before = model.generate(**prompt, **options)
with run.suite.steer(model, layer=layer, latent=latent, scale=0.5):
    after = model.generate(**prompt, **options)
print("before:", tokenizer.decode(before[0]), "\nafter:", tokenizer.decode(after[0]), sep="\n")

# %% [markdown]
# ## From here
#
# - Every name with shapes, units and errors: [The Python API](python.md).
# - `suite.save`, `suite.push_to_hub`, `Suite.from_pretrained("owner/name")`:
#   [Formats](formats.md).
# - All options of training: [Configuration](configuration.md).

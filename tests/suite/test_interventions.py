"""Capture, splice and steer, against hooks written by hand on models of many families."""

import copy
import functools
from contextlib import ExitStack, nullcontext

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from groupsae.evaluation.heldout import _reconstruct
from groupsae.lm.attached import AttachedLM
from groupsae.lm.hookpoints import HOOKPOINTS
from groupsae.lm.splice import Splicer
from groupsae.runtime.errors import UserError
from groupsae.sae.topk import TopK
from groupsae.suite.interventions import _bounds
from groupsae.suite.suite import Suite
from tests.helpers import families
from tests.helpers.families import DECODERS, ENCODERS, LAYERS, PAIRS, WIDTH, draw_tokens
from tests.helpers.lms import frozen
from tests.helpers.saes import generator, make

CPU = torch.device("cpu")
D_SAE, K = 64, 6
BOTH = [(family, stack) for family in PAIRS for stack in ("encoder", "decoder")]
STACKS = [(family, None) for family in (*DECODERS, *ENCODERS, "multimodal")] + BOTH
GENERATING = ["gpt_neox", "gpt2", "llama", "gemma3", "qwen3_moe", "bloom", "opt", "falcon"]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory, tiny_lm):
    @functools.cache
    def folder(family):
        return families.save(family, tmp_path_factory.mktemp(family), tiny_lm)

    return folder


@pytest.fixture(scope="module")
def model_of(folder_of):
    """Return a complete model as a user loads it."""

    @functools.cache
    def load(family, **options):
        return families.auto_class(family).from_pretrained(folder_of(family), **options).eval()

    return load


def suite_for(lm, layers=None, d_model=WIDTH):
    """Return a suite with one TopK for all layers, as a run with this model records it."""
    layers = list(range(lm.geometry.num_layers)) if layers is None else layers
    sae = TopK(d_model=d_model, d_sae=D_SAE, k=K, tied=False, generator=generator())
    with torch.no_grad():
        for number, parameter in enumerate(sae.parameters()):
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator(number))
    sae.normalize_decoder()
    factors = {str(layer): 0.5 * 1.3**layer for layer in layers}
    return Suite(
        {"all": sae}, {"all": {"layers": layers, "norm_factors": factors} | lm.described()}
    )


def inputs_of(family, tokens=None):
    tokens = draw_tokens() if tokens is None else tokens
    given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return given | ({"decoder_input_ids": tokens.flip(1)} if family in PAIRS else {})


@torch.no_grad()
def by_hand(model, lm, layer, inputs, change=None):
    """Return the activations and the logits of a forward with a plain hook on a named module."""
    path = lm.described()["modules"][layer]
    module = next(m for n, m in model.named_modules() if f".{n}".endswith(f".{path}"))
    found = []

    def edit(acts):
        found.append(acts.clone())
        return acts if change is None else change(acts)

    def before(_module, args, kwargs):
        if args:
            return (edit(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": edit(kwargs["hidden_states"])}

    def after(_module, _args, output):
        if isinstance(output, torch.Tensor):
            return edit(output)
        return (edit(output[0]), *output[1:])

    if lm.hookpoint == "resid_pre":
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after)
    try:
        logits = model(**inputs).logits
    finally:
        handle.remove()
    return found[0].view(*inputs["input_ids"].shape, WIDTH), logits


@torch.no_grad()
def logits_in(block, model, inputs):
    with block:
        return model(**inputs).logits


@pytest.mark.parametrize("hookpoint", HOOKPOINTS)
@pytest.mark.parametrize(("family", "stack"), STACKS)
def test_every_family_captures_splices_and_steers_as_hooks_by_hand(
    folder_of, model_of, family, stack, hookpoint
):
    lm = frozen(folder_of(family), stack=stack, hookpoint=hookpoint)
    model, inputs, suite, layer = model_of(family), inputs_of(family), suite_for(lm), 1
    sae, row, factor = suite[layer], suite[layer].W_dec[7], suite.norm_factor(layer)
    raw, clean = by_hand(model, lm, layer, inputs)
    with suite.capture(model) as cache, torch.no_grad():
        assert torch.equal(logits_in(nullcontext(), model, inputs), clean)
    assert list(cache) == suite.layers
    assert torch.equal(cache[layer].acts, raw)
    assert torch.equal(cache[layer].latents, suite.encode(raw, layer))
    read = inputs["decoder_input_ids" if stack == "decoder" else "input_ids"]
    assert torch.equal(cache[layer].tokens, read)
    assert cache[layer].mask.all()

    def added(acts):
        return acts + 3.0 * (row / factor)

    for block, change in (
        (suite.splice(model, layer), lambda acts: sae(acts)),
        (suite.steer(model, layer, 7, 3.0), added),
    ):
        changed = logits_in(block, model, inputs)
        assert torch.equal(changed, by_hand(model, lm, layer, inputs, change)[1])
        assert not torch.allclose(changed, clean, atol=1e-3)
    assert torch.equal(logits_in(suite.splice(model, error=True), model, inputs), clean)
    assert torch.equal(logits_in(nullcontext(), model, inputs), clean)


@pytest.mark.parametrize("hookpoint", ["resid_post", "mlp_out"])
@pytest.mark.parametrize("family", ["gpt_neox", "gemma3", "falcon", "bart"])
def test_a_spliced_layer_gives_the_logits_that_evaluation_measures(folder_of, family, hookpoint):
    stack = "decoder" if family in PAIRS else None
    lm = frozen(folder_of(family), stack=stack, hookpoint=hookpoint)
    with_head = lm.load_with_head(CPU)
    suite, tokens, splicer = suite_for(lm), draw_tokens(), Splicer(with_head)
    _, acts = splicer.clean(tokens, suite.layers)
    inputs = with_head.inputs(tokens)
    for layer in suite.layers:
        wanted = splicer.resume(layer, _reconstruct(suite, acts[layer].float(), layer)[1])
        assert torch.equal(
            logits_in(suite.splice(with_head.model, layer), with_head.model, inputs), wanted
        )
    together = splicer.together(
        lambda layer, found: _reconstruct(suite, found.float(), layer)[1], suite.layers
    )
    assert torch.equal(logits_in(suite.splice(with_head.model), with_head.model, inputs), together)


@pytest.fixture
def llama(folder_of, model_of):
    """Return a model, its suite and inputs of two texts without padding."""
    return model_of("llama"), suite_for(frozen(folder_of("llama"))), inputs_of("llama")


# ---- generation -----------------------------------------------------------------------------


def generate(model, tokens, mask=None, **options):
    mask = torch.ones_like(tokens) if mask is None else mask
    return model.generate(
        input_ids=tokens, attention_mask=mask, max_new_tokens=6, do_sample=False,
        pad_token_id=1, eos_token_id=None, **options,
    )  # fmt: skip


def strong(suite, model, **more):
    """Return a change that is seen in what is generated."""
    return suite.steer(model, 1, [7, 9], [30.0, -20.0], set={3: 20.0}, **more)


@pytest.mark.parametrize("family", GENERATING)
def test_generation_is_the_same_with_and_without_a_cache(folder_of, model_of, family):
    model, suite, tokens = (
        model_of(family),
        suite_for(frozen(folder_of(family))),
        draw_tokens(2, 8),
    )
    plain = generate(model, tokens)
    for block in (
        lambda: strong(suite, model),
        lambda: strong(suite, model, positions=slice(8, None)),
        lambda: suite.splice(model),
        lambda: suite.splice(model, positions=slice(1, None)),
    ):
        found = []
        for use_cache in (True, False):
            with block(), suite.capture(model, 1) as cache:
                found.append((generate(model, tokens, use_cache=use_cache), cache))
        (cached, seen), (fresh, seen_fresh) = found
        assert torch.equal(cached, fresh)
        assert not torch.equal(cached, plain)
        assert (len(seen.batches), len(seen_fresh.batches)) == (1, 6)
        assert torch.equal(seen[1].tokens, cached[:, :-1])
        assert torch.equal(seen_fresh[1].tokens, cached[:, :-1])
        torch.testing.assert_close(seen[1].acts, seen_fresh[1].acts, rtol=1e-3, atol=1e-3)


def test_only_what_is_generated_can_be_steered(llama):
    model, suite, _ = llama
    tokens = draw_tokens(2, 8)
    with suite.capture(model, 2) as before:
        generate(model, tokens)
    with (
        suite.steer(model, 1, 7, 30.0, positions=slice(8, None)),
        suite.capture(model, 2) as after,
    ):
        steered = generate(model, tokens)
    assert torch.equal(after[2].acts[:, :8], before[2].acts[:, :8])
    assert not torch.equal(after[2].acts[:, 8], before[2].acts[:, 8])
    # the prompt, which is not changed, decides the first token
    assert torch.equal(steered[:, 8], before[2].tokens[:, 8])


def test_a_padded_batch_generates_what_each_text_does_alone(llama):
    model, suite, _ = llama
    long, short = draw_tokens(2, 9)[:, [0, 1, 2, 3, 4, 6, 7, 8]]  # without the padding token
    short = short[3:]
    batch = torch.stack([long, torch.cat([torch.ones(3, dtype=torch.long), short])])
    mask = torch.stack([torch.ones(8), torch.tensor([0] * 3 + [1] * 5)]).long()
    with strong(suite, model), suite.capture(model, 2) as cache:
        together = generate(model, batch, mask)
    for row, text in ((0, long), (1, short)):
        with strong(suite, model), suite.capture(model, 2) as alone:
            single = generate(model, text[None])
        start = 8 - len(text)
        assert torch.equal(together[row, start:], single[0])
        torch.testing.assert_close(
            cache[2].acts[row, start:], alone[2].acts[0], rtol=1e-3, atol=1e-3
        )
    assert cache[2].mask.int().sum(1).tolist() == [13, 10]
    assert (cache[2].active().query("batch == 1").position >= 3).all()


def test_padding_on_the_right_is_left_out_of_the_table(llama):
    model, suite, inputs = llama
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][0, 7:] = 0
    with suite.capture(model, 1) as cache:
        model(**inputs)
    shown = cache[1].active()
    assert shown.query("batch == 0").position.max() == 6
    assert shown.query("batch == 1").position.max() == 11
    assert len(shown) == (cache[1].latents[cache[1].mask] > 0).sum()


def test_a_static_cache_which_transformers_would_compile_for_is_seen_in_every_step(llama):
    from transformers import CompileConfig

    model, suite, _ = llama
    config = CompileConfig(backend="eager", mode=None, fullgraph=False)
    config._compile_all_devices = True
    static, tokens = (
        {"cache_implementation": "static", "compile_config": config},
        draw_tokens(2, 8),
    )
    generate(model, tokens, **static)
    assert model._compiled_call  # so this is a model that it compiles
    with strong(suite, model), suite.capture(model, 1) as cache:
        steered = generate(model, tokens, **static)
        assert torch.equal(steered, generate(model, tokens))
    assert cache.batches[0][1].acts.shape[1] == 13
    assert "get_compiled_call" not in vars(model)


def test_rejected_tokens_of_an_assisted_generation_are_not_kept(llama):
    model, suite, _ = llama
    tokens = draw_tokens(1, 6).repeat(1, 3)
    with suite.capture(model, 1) as cache:
        text = generate(model, tokens, prompt_lookup_num_tokens=3)
    assert torch.equal(cache[1].tokens, text[:, : cache[1].acts.shape[1]])
    assert cache[1].acts.shape[1] >= text.shape[1] - 1
    with suite.capture(model, 1) as plain, torch.no_grad():
        model(input_ids=cache[1].tokens)
    torch.testing.assert_close(cache[1].acts, plain[1].acts, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_stacks_of_one_depth_are_told_apart_also_while_generating(
    tmp_path, tiny_lm, family, stack
):
    config = families.config_of(family).to_dict()
    for key in ("num_decoder_layers", "decoder_layers"):
        if key in config:
            config[key] = LAYERS
    torch.manual_seed(0)
    config = type(families.config_of(family)).from_dict(config)
    random = families.auto_class(family).from_config(config).requires_grad_(False)
    for parameter in random.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape))
    random.save_pretrained(tmp_path)
    model = families.auto_class(family).from_pretrained(tmp_path).eval()
    suite, tokens = suite_for(frozen(tmp_path, stack=stack)), draw_tokens(2, 8)
    with suite.capture(model, 1) as cache:
        written = generate(model, tokens, decoder_start_token_id=0)
    assert torch.equal(cache[1].tokens, tokens if stack == "encoder" else written[:, :-1])
    with torch.no_grad():
        output = model(
            input_ids=tokens, attention_mask=torch.ones_like(tokens),
            decoder_input_ids=written[:, :-1], output_hidden_states=True,
        )  # fmt: skip
    wanted = output[f"{stack}_hidden_states"][2]
    torch.testing.assert_close(cache[1].acts, wanted, rtol=1e-3, atol=1e-3)
    with strong(suite, model):
        steered, again = (
            generate(model, tokens, decoder_start_token_id=0, use_cache=use_cache)
            for use_cache in (True, False)
        )
    assert torch.equal(steered, again)
    assert not torch.equal(steered, written)
    if stack == "encoder":
        alone = model.get_encoder()
        with suite.capture(alone, 1) as cache, torch.no_grad():
            alone(tokens)
        torch.testing.assert_close(cache[1].acts, wanted, rtol=1e-3, atol=1e-3)


def test_a_cache_that_does_not_know_its_length_is_followed(tmp_path):
    from transformers import AutoModelForCausalLM, MambaConfig

    config = MambaConfig(
        vocab_size=512, hidden_size=WIDTH, num_hidden_layers=2, state_size=4, pad_token_id=1
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    suite = suite_for(frozen(tmp_path))
    with suite.capture(model, 1) as cache:
        text = generate(model, draw_tokens(2, 8))
    assert torch.equal(cache[1].tokens, text[:, :-1])


# ---- captured -------------------------------------------------------------------------------


def test_each_text_of_a_loop_is_a_batch_and_the_last_is_at_hand(llama):
    model, suite, _ = llama
    texts = [draw_tokens(1, 6), draw_tokens(3, 7), draw_tokens(2, 8)[:, :4]]
    with suite.capture(model, [0, 2]) as cache, torch.no_grad():
        for tokens in texts:
            model(tokens)  # by position
    assert [list(batch) for batch in cache.batches] == [[0, 2]] * 3
    for tokens, batch in zip(texts, cache.batches, strict=True):
        assert torch.equal(batch[2].tokens, tokens)
    assert cache[0] is cache.batches[-1][0]
    assert repr(cache) == "Cache(layers=[0, 2], batches=3)"
    assert repr(cache[2]) == f"Captured(layer=2, acts=[2, 4, {WIDTH}], latents=[2, 4, {D_SAE}])"


def test_two_continuations_of_one_prefix_are_two_batches(llama):
    model, suite, _ = llama
    prefix, tails = draw_tokens(1, 6), [draw_tokens(1, 7)[:, :3], draw_tokens(1, 8)[:, 3:]]
    with torch.no_grad():
        past = model(prefix, use_cache=True).past_key_values
        with suite.capture(model, 1) as cache:
            for tail in tails:
                model(tail, past_key_values=copy.deepcopy(past))
        assert [batch[1].acts.shape[1] for batch in cache.batches] == [3, 5]
        with suite.capture(model, 1) as full:
            model(torch.cat([prefix, tails[1]], dim=1))
    torch.testing.assert_close(cache[1].acts, full[1].acts[:, 6:], rtol=1e-4, atol=1e-4)


def test_a_cache_that_was_filled_before_the_block_is_a_batch_of_its_own(llama):
    model, suite, inputs = llama
    cache = model(inputs["input_ids"][:, :3], use_cache=True).past_key_values
    with suite.capture(model, 1) as captured:
        model(inputs["input_ids"])
        model(inputs["input_ids"][:, 3:4], past_key_values=cache)
    first, second = captured.batches
    assert torch.equal(first[1].tokens, inputs["input_ids"])
    assert torch.equal(second[1].tokens, inputs["input_ids"][:, 3:4])


def test_the_table_of_a_suite_in_bfloat16(folder_of, model_of):
    suite = suite_for(frozen(folder_of("llama"))).to(torch.bfloat16)
    with suite.capture(model_of("llama"), 1) as cache:
        model_of("llama")(**inputs_of("llama"))
    assert len(cache[1].active())


def test_top_has_each_latent_once_where_it_is_strongest(llama):
    model, suite, inputs = llama

    class Letters:
        def decode(self, ids):
            return f"<{ids[0]}>"

    with suite.capture(model, 1, tokenizer=Letters()) as cache, torch.no_grad():
        model(**inputs)
    latents, tokens, top = cache[1].latents, inputs["input_ids"], cache[1].top(5)
    assert list(top.columns) == ["latent", "value", "batch", "position", "token"]
    best = latents.amax((0, 1)).topk(5)
    assert top.value.tolist() == best.values.tolist()
    assert top.latent.tolist() == best.indices.tolist()
    for row in top.itertuples():
        assert latents[row.batch, row.position, row.latent] == row.value
        assert row.token == f"<{tokens[row.batch, row.position]}>"
    assert len(cache[1].active()) == (latents > 0).sum()
    assert len(cache[1].top(10_000)) == (latents.amax((0, 1)) > 0).sum()
    with suite.capture(model, 1) as cache, torch.no_grad():
        model(inputs_embeds=model.get_input_embeddings()(tokens))
    assert torch.equal(cache[1].latents, latents)
    assert cache[1].tokens is None
    assert "token" not in cache[1].top()


def test_gradients_reach_what_is_captured(llama):
    model, suite, inputs = llama
    with suite.capture(model, 1) as cache:
        loss = model(**inputs, labels=inputs["input_ids"]).loss
    (found,) = torch.autograd.grad(loss, cache[1].acts, retain_graph=True)
    assert found.abs().sum() > 0
    # the effect of a latent to first order: steering a little
    with torch.no_grad(), suite.steer(model, 1, 7, 1e-2):
        changed = model(**inputs, labels=inputs["input_ids"]).loss
    predicted = 1e-2 * (found @ suite[1].direction(7)).sum()
    torch.testing.assert_close(changed - loss, predicted, rtol=0.1, atol=1e-6)
    cache[1].latents.sum().backward()  # reaches the model's weights through the encoder
    with torch.no_grad(), suite.capture(model, 1) as cache:
        model(**inputs)
    assert not cache[1].acts.requires_grad
    assert not cache[1].latents.requires_grad


def test_with_its_error_the_forward_is_the_same_and_gradients_go_through_the_sae(llama):
    model, suite, inputs = llama
    clean = model(**inputs).logits
    capture, splice = suite.capture(model, 1), suite.splice(model, 1, error=True)
    with capture as before, splice, suite.capture(model, 1) as after:
        logits = model(**inputs).logits
    assert torch.equal(logits, clean)
    upstream, found = torch.autograd.grad(logits.sum(), [after[1].acts, before[1].acts])
    acts = before[1].acts.detach().requires_grad_()
    (wanted,) = torch.autograd.grad(suite[1](acts), acts, upstream)
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(found, upstream)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_modules_that_run_again_for_their_gradients_are_captured_once(folder_of):
    suite, inputs = suite_for(frozen(folder_of("llama"), hookpoint="mlp_out")), inputs_of("llama")
    model = families.auto_class("llama").from_pretrained(folder_of("llama"))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with suite.capture(model, 1) as cache, suite.splice(model, 1):
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    assert len(cache.batches) == 1
    assert cache[1].acts.shape == (2, 12, WIDTH)


def test_the_sae_keeps_its_precision_under_autocast(llama):
    model, suite, inputs = llama
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), ExitStack() as blocks:
        before = blocks.enter_context(suite.capture(model, 1))
        blocks.enter_context(suite.splice(model, 1))
        spliced = blocks.enter_context(suite.capture(model, 1))
        blocks.enter_context(suite.steer(model, 1, ablate=[3], set={5: 1.0}))
        after = blocks.enter_context(suite.capture(model, 1))
        model(**inputs)
        latents = before[1].latents
    acts = before[1].acts
    assert torch.equal(latents, suite.encode(acts, 1))
    assert torch.equal(spliced[1].acts, suite[1](acts).to(acts))
    z = suite.encode(spliced[1].acts, 1)[..., [3, 5]]
    edits = (torch.tensor([0.0, 1.0]) - z) @ suite[1].direction([3, 5])
    assert torch.equal(after[1].acts, (spliced[1].acts + edits).to(acts))


# ---- latents that are changed ---------------------------------------------------------------


def changed_at(model, suite, inputs, layer=1, **changes):
    with suite.steer(model, layer, **changes), suite.capture(model, layer) as cache:
        logits_in(nullcontext(), model, inputs)
    return cache[layer].acts


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "matryoshka", "jumprelu", "relu", "gated"])
def test_edited_latents_move_the_activations_by_the_difference_of_their_decoding(
    llama, folder_of, kind
):
    model, _, inputs = llama
    sae = make(kind, d_model=WIDTH)
    config = {"layers": [1], "norm_factors": {"1": 0.7}} | frozen(folder_of("llama")).described()
    suite = Suite({"one": sae}, {"one": config})
    with suite.capture(model, 1) as cache, torch.no_grad():
        model(**inputs)
    acts, z = cache[1].acts, cache[1].latents.clone()
    strongest = z.sum((0, 1)).topk(5).indices.tolist()
    a, b, c, d, e = strongest
    middle = float(z[..., c][z[..., c] > 0].median())
    edited = z.clone()
    edited[..., a] = 0
    edited[..., b] = 2.5
    edited[..., c] = edited[..., c].clamp(max=middle)
    edited[..., d] *= -3
    edited[..., e] += 4
    found = changed_at(
        model, suite, inputs, ablate=[a], set={b: 2.5}, clamp={c: (None, middle)},
        multiply={d: -3}, latent=e, scale=4.0,
    )  # fmt: skip
    wanted = acts + (suite.decode(edited, 1) - suite.decode(z, 1))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, acts, atol=1e-2)
    # where nothing changes, not a bit does
    same = changed_at(model, suite, inputs, multiply={a: 1}, clamp={b: (0, None)})
    assert torch.equal(same, acts)
    resting = (z[..., a] == 0).unsqueeze(-1)
    ablated = changed_at(model, suite, inputs, ablate=[a])
    assert torch.equal(torch.where(resting, ablated, acts), acts)
    assert not torch.equal(ablated, acts)


def test_one_scale_for_several_latents_or_one_each(llama):
    model, suite, inputs = llama
    acts = changed_at(model, suite, inputs, multiply={0: 1})
    row = suite[1].direction
    same = changed_at(model, suite, inputs, latent=[3, 5], scale=2.0)
    torch.testing.assert_close(same, acts + 2 * (row(3) + row(5)))
    each = changed_at(model, suite, inputs, latent=[3, 5], scale=[2.0, -1.0])
    torch.testing.assert_close(each, acts + 2 * row(3) - row(5))
    for latents in (np.array([3, 5]), torch.tensor([3, 5]), pd.Series([3, 5], index=[8, 9])):
        again = changed_at(model, suite, inputs, latent=latents, scale=torch.tensor([2.0, -1.0]))
        assert torch.equal(again, each)
    table = pd.DataFrame({"latent": [3]})
    single = changed_at(model, suite, inputs, latent=table.latent[0], scale=np.float32(2))
    assert torch.equal(single, changed_at(model, suite, inputs, latent=3, scale=2))
    ablated = changed_at(model, suite, inputs, ablate=torch.tensor(3))
    assert torch.equal(ablated, changed_at(model, suite, inputs, set={3: 0}))
    one = changed_at(model, suite, inputs, latent=3, scale=2.0, positions=slice(2, 9, 3))
    moved = (one != acts).any(-1).any(0)
    assert moved.nonzero().flatten().tolist() == [2, 5, 8]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_in_other_dtypes_keep_theirs(folder_of, model_of, dtype):
    lm, model, inputs = (
        frozen(folder_of("llama")),
        model_of("llama", dtype=dtype),
        inputs_of("llama"),
    )
    suite = suite_for(lm)
    raw, clean = by_hand(model, lm, 1, inputs)
    with suite.capture(model, 1) as cache:
        assert torch.equal(logits_in(suite.splice(model, error=True), model, inputs), clean)
    assert cache[1].acts.dtype == dtype
    assert torch.equal(cache[1].acts, raw)
    assert torch.equal(cache[1].latents, suite.encode(raw, 1))
    spliced = by_hand(model, lm, 1, inputs, lambda acts: suite[1](acts).to(dtype))[1]
    assert torch.equal(logits_in(suite.splice(model, 1), model, inputs), spliced)
    direction = suite[1].direction(7)
    added = by_hand(model, lm, 1, inputs, lambda acts: (acts + 3 * direction).to(dtype))[1]
    assert torch.equal(logits_in(suite.steer(model, 1, 7, 3.0), model, inputs), added)


# ---- hooks ----------------------------------------------------------------------------------


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_no_hook_is_left_also_after_an_exception(llama):
    model, suite, inputs = llama
    assert hooks_of(model) == 0
    for block in (suite.capture(model), suite.splice(model), suite.steer(model, 1, 7)):
        with pytest.raises(ZeroDivisionError), block:
            assert 1 / (hooks_of(model) == 0)
        assert hooks_of(model) == 0
    long = {"input_ids": torch.ones(1, families.CONTEXT + 1, dtype=torch.long)}
    with pytest.raises(UserError, match="has 65 tokens, but LlamaForCausalLM reads at most 64"):
        logits_in(suite.splice(model), model, long)
    assert hooks_of(model) == 0
    with suite.capture(model, 1) as cache:  # nothing of the failed forward is left
        model(**inputs)
    assert torch.equal(cache[1].tokens, inputs["input_ids"])


def test_blocks_on_one_layer_act_in_the_order_in_which_they_are_entered(llama):
    model, suite, inputs = llama
    with torch.no_grad(), ExitStack() as blocks:
        around = blocks.enter_context(suite.capture(model, 1))
        blocks.enter_context(suite.splice(model, 1))
        spliced = blocks.enter_context(suite.capture(model, 1))
        blocks.enter_context(suite.steer(model, 1, 7, 2.0))
        steered = blocks.enter_context(suite.capture(model, 1))
        blocks.enter_context(suite.steer(model, 1, 9, 1.0))
        last = blocks.enter_context(suite.capture(model, 1))
        model(**inputs)
    assert torch.equal(spliced[1].acts, suite[1](around[1].acts))
    assert torch.equal(steered[1].acts, spliced[1].acts + 2 * suite[1].direction(7))
    assert torch.equal(last[1].acts, steered[1].acts + suite[1].direction(9))


def test_a_later_layer_sees_what_an_earlier_one_leaves_whichever_block_is_entered_first(llama):
    model, suite, inputs = llama
    with suite.splice(model, 0), suite.steer(model, 2, 7, 2.0):
        one = model(**inputs).logits
    with suite.steer(model, 2, 7, 2.0), suite.splice(model, 0):
        other = model(**inputs).logits
    assert torch.equal(one, other)


def test_a_block_in_which_the_model_does_not_run_warns(llama):
    model, suite, _ = llama
    unused = pytest.warns(UserWarning, match="LlamaForCausalLM did not run inside the block")
    with unused as found, suite.steer(model, 1, 7):
        pass
    assert found[0].filename == __file__
    with pytest.warns(UserWarning, match="did not run"), suite.capture(model, 1) as cache:
        pass
    with pytest.raises(UserError, match="layer 1 has shown nothing: run the model"):
        cache[1]


# ---- which models ---------------------------------------------------------------------------


class Wrapper(nn.Module):
    """What PEFT puts around a model: `PeftModelForCausalLM.base_model.model` is the original."""

    def __init__(self, model):
        super().__init__()
        self.config, self.base_model = model.config, nn.Module()
        self.base_model.model = model
        self.base_model.forward = lambda *args, **kwargs: model(*args, **kwargs)

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        return self.base_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


@pytest.mark.parametrize("hookpoint", HOOKPOINTS)
@pytest.mark.parametrize("family", ["gpt_neox", "gemma3", "bert"])
def test_wrapped_models_and_those_without_a_head_have_the_same_layers(
    folder_of, model_of, family, hookpoint
):
    lm, model, inputs = (
        frozen(folder_of(family), hookpoint=hookpoint),
        model_of(family),
        inputs_of(family),
    )
    suite = suite_for(lm)
    raw, _ = by_hand(model, lm, 1, inputs)
    for each in (Wrapper(model), model.base_model):
        with suite.capture(each, 1) as cache, torch.no_grad():
            each(**inputs)
        assert torch.equal(cache[1].acts, raw)
        assert torch.equal(cache[1].tokens, inputs["input_ids"])
    with suite.capture(model, 1) as cache, torch.no_grad():  # its inner model alone
        model.base_model(**inputs)
    assert torch.equal(cache[1].tokens, inputs["input_ids"])


@pytest.mark.parametrize("hookpoint", HOOKPOINTS)
def test_recorded_places_of_another_version_or_none_are_searched_by_structure(
    folder_of, model_of, hookpoint
):
    lm, model, inputs = (
        frozen(folder_of("gpt2"), hookpoint=hookpoint),
        model_of("gpt2"),
        inputs_of("gpt2"),
    )
    raw, _ = by_hand(model, lm, 1, inputs)
    for modules in (None, [f"old.blocks.{layer}.renamed" for layer in range(LAYERS)]):
        suite = suite_for(lm)
        suite.configs["all"]["modules"] = modules
        with suite.capture(model, 1) as cache, torch.no_grad():
            model(**inputs)
        assert torch.equal(cache[1].acts, raw)


def test_positions_that_a_model_adds_have_no_token(llama):
    """Prompt tuning puts learned embeddings before those of the text."""
    model, suite, inputs = llama

    class Tuned(Wrapper):
        def forward(self, input_ids, attention_mask=None):
            model = self.base_model.model
            embedded = model.get_input_embeddings()(input_ids)
            return model(inputs_embeds=torch.cat([embedded[:, :3], embedded], dim=1))

    with suite.capture(Tuned(model), 1) as cache, torch.no_grad():
        Tuned(model)(inputs["input_ids"])  # another wrapper of the same model
    assert cache[1].acts.shape == (2, 15, WIDTH)
    tuned = Tuned(model)
    with suite.capture(tuned, 1) as cache, torch.no_grad():
        tuned(**inputs)
    assert cache[1].acts.shape == (2, 15, WIDTH)
    assert cache[1].tokens is None
    assert cache[1].mask.all()


def test_a_module_named_by_hand_is_the_one_that_is_hooked(folder_of, model_of):
    lm = frozen(folder_of("gemma2"), hookpoint="mlp_out", submodule="mlp.down_proj")
    model, inputs, suite = model_of("gemma2"), inputs_of("gemma2"), suite_for(lm)
    raw, _ = by_hand(model, lm, 1, inputs)
    with suite.capture(model, 1) as cache, torch.no_grad():
        model(**inputs)
    assert torch.equal(cache[1].acts, raw)


def test_compiled_blocks_work_and_models_compiled_in_one_piece_are_refused(folder_of):
    lm = frozen(folder_of("llama"))
    suite, inputs = suite_for(lm), inputs_of("llama")
    model = families.auto_class("llama").from_pretrained(lm.path).eval()
    wanted = logits_in(suite.steer(model, 1, 7, 2.0), model, inputs)
    compiled = torch.compile(model, backend="eager")
    refusal = "LlamaForCausalLM was compiled in one piece with block 1.*_orig_mod"
    with pytest.raises(UserError, match="was compiled in one piece with block 1.*_orig_mod"):
        logits_in(suite.steer(compiled, 1, 7, 2.0), compiled, inputs)
    assert torch.equal(
        logits_in(suite.steer(compiled._orig_mod, 1, 7, 2.0), model, inputs), wanted
    )
    for block in model.model.layers:  # as model.compile=true does
        block.forward = torch.compile(block.forward, backend="eager")
    torch.testing.assert_close(logits_in(suite.steer(model, 1, 7, 2.0), model, inputs), wanted)
    model.model.compile(backend="eager")
    with pytest.raises(UserError, match=refusal):
        logits_in(suite.steer(model, 1, 7, 2.0), model, inputs)


def test_a_model_of_another_size_is_refused_before_it_runs(folder_of, tiny_lm):
    from transformers import AutoModelForCausalLM

    suite, inputs = suite_for(frozen(folder_of("llama"))), inputs_of("llama")
    other = AutoModelForCausalLM.from_pretrained(tiny_lm)  # 4 layers, 32 wide
    with pytest.raises(UserError, match=r"llama.* of width 16, but .*has 4 of width 32"):
        logits_in(suite.splice(other), other, inputs)
    config = families.config_of("llama").to_dict() | {"num_hidden_layers": LAYERS + 2}
    deeper = families.auto_class("llama").from_config(families.DECODERS["llama"].from_dict(config))
    with pytest.raises(UserError, match="with 3 layers .*, but Llama.* has 5 of .*: give"):
        logits_in(suite.splice(deeper), deeper, inputs)
    config["num_hidden_layers"] = LAYERS - 1
    shallower = families.auto_class("llama").from_config(
        families.DECODERS["llama"].from_dict(config)
    )
    with pytest.raises(UserError, match="with 3 layers .*, but Llama.* has 2 of .*: give"):
        AttachedLM(shallower, {}, 16, highest=LAYERS - 1)  # (as imports record it)
    with pytest.raises(UserError, match="without a config of transformers"):
        logits_in(suite.splice(nn.Linear(2, 2)), other, inputs)


def test_what_cannot_be_done_is_refused_in_one_sentence(llama):
    model, suite, inputs = llama
    on_meta = suite_for(frozen(suite.configs["all"]["model"])).to("meta")
    for block, sentence in (
        (
            lambda: suite.capture(model, [1, 9]),
            r"no SAE for layer 9; this suite covers .*\[0, 1, 2",
        ),
        (lambda: suite.capture(model, []), "layers is empty: give some of"),
        (lambda: suite.steer(model, 9, 7), "no SAE for layer 9"),
        (lambda: suite.steer(model, 1, D_SAE), "latent 64 is out of range: all has 64 latents"),
        (lambda: suite.steer(model, 1, ablate=[-1]), "latent -1 is out of range"),
        (lambda: suite.steer(model, 1), "changes nothing: give latent="),
        (lambda: suite.steer(model, 1, 7, set={7: 1.0}), "changes latent 7 twice"),
        (lambda: suite.steer(model, 1, clamp={7: (2, 1)}), "clamp of latent 7 is 2 to 1"),
        (lambda: _bounds(7, 2.0), r"latent 7 is 2.0: give \(low, high\)"),
        (lambda: suite.steer(model, 1, 7, [1.0, 2.0]), "1 latents and 2 scales"),
        (lambda: suite.steer(model, 1, 7, positions=slice(-1, None)), "counts from the first"),
        (lambda: suite.splice(model, positions=slice(None, -2)), "counts from the first"),
        (lambda: on_meta.splice(model), r"suite is on meta and the model on cpu: suite.to\('cpu'"),
    ):
        with pytest.raises(UserError, match=sentence):
            logits_in(block(), model, inputs)
    with suite.capture(model, 1) as cache:
        model(**inputs)
    with pytest.raises(UserError, match=r"layer 0 is not captured; captured are \[1\]"):
        cache[0]
    assert 1 in cache
    assert 0 not in cache


def test_arguments_of_another_type_are_refused_in_one_sentence(llama):
    model, suite, _ = llama
    wrong = (
        (lambda: suite.steer(model, 1, {7: 4.0}), "latent is {7: 4.0}: give its number"),
        (lambda: suite.steer(model, 1, 1.5), "latent is 1.5: give its number"),
        (
            lambda: suite.steer(model, 1, ablate=torch.ones(D_SAE, dtype=torch.bool)),
            "latent is True: give its number",
        ),
        (lambda: suite.steer(model, 1, set=[7]), r"set is \[7\]: give a dict"),
        (lambda: suite.steer(model, 1, 7, positions=3), "positions is 3: give a slice"),
        (lambda: suite.steer(model, [1, 2], 7), r"suite\[\[1, 2\]\]: give the number of one"),
        (lambda: suite.splice(model, "1"), "layer is '1': give its number"),
        (lambda: suite.capture("gpt2"), "the model is str, .*: give a Hugging Face model"),
    )
    jaxtyping.config.update("jaxtyping_disable", True)  # users have no checks of types
    try:
        for block, sentence in wrong:
            with pytest.raises(UserError, match=sentence):
                block()
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)

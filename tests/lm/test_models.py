"""Models of many families from a folder, against Hugging Face's own hidden states and sums."""

import pytest
import torch
from transformers import (
    CodeGenConfig,
    DebertaV2Config,
    FalconConfig,
    GPTJConfig,
    LEDConfig,
    LlamaConfig,
    MambaConfig,
    MPNetConfig,
    PreTrainedConfig,
    T5Config,
    XLNetConfig,
)

from groupsae.lm.geometry import geometry_of
from groupsae.lm.hookpoints import HOOKPOINTS
from groupsae.lm.options import check_load_options
from groupsae.runtime.errors import UserError
from tests.helpers import families
from tests.helpers.families import (
    CONTEXT,
    DECODERS,
    ENCODERS,
    GATED,
    LAYERS,
    NAMES,
    PAIRS,
    SHARED,
    SMALL,
    VOCAB,
    WIDTH,
    draw_tokens,
)
from tests.helpers.lms import frozen

CPU = torch.device("cpu")
LED = LEDConfig(
    **NAMES, d_model=WIDTH, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, attention_window=4,
    max_encoder_position_embeddings=40, max_decoder_position_embeddings=24,
    decoder_start_token_id=0,
)  # fmt: skip
BOTH = [(family, stack) for family in PAIRS for stack in ("encoder", "decoder")]
STACKS = [(family, None) for family in (*DECODERS, *ENCODERS, "multimodal")] + BOTH


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory, tiny_lm):
    made = {}

    def folder(family):
        if family not in made:
            made[family] = families.save(family, tmp_path_factory.mktemp(family), tiny_lm)
        return made[family]

    return folder


def seen(lm, tokens, stop=True, layers=None):
    found = {}
    layers = range(len(lm.blocks)) if layers is None else layers
    lm.run(lm.inputs(tokens), layers, lambda i, acts: found.update({i: acts.clone()}), stop)
    return found


def hidden_states(family, folder, stack, tokens):
    """Return the embeddings and each block's output, the last after the final norm, as HF has it.

    The mask says that all is text; the decoder's input is written out by hand.
    """
    model = families.auto_class(family).from_pretrained(folder).eval()
    ones = torch.ones_like(tokens)
    given = {"input_ids": tokens, "attention_mask": ones, "output_hidden_states": True}
    if family in PAIRS:
        start = 1 if family == "t5" else 0
        shifted = torch.tensor([[start, *row[:-1]] for row in tokens.tolist()])
        given |= {"decoder_input_ids": shifted, "decoder_attention_mask": ones}
    with torch.no_grad():
        output = model(**given)
    return output.hidden_states if stack is None else output[f"{stack}_hidden_states"]


@pytest.mark.parametrize(("family", "stack"), STACKS)
def test_residuals_are_the_hidden_states_except_after_the_last_block(folder_of, family, stack):
    folder, tokens = folder_of(family), draw_tokens()
    depth = LAYERS + (stack == "decoder")
    lm = frozen(folder, stack=stack)
    assert (lm.geometry.num_layers, lm.geometry.d_model) == (depth, WIDTH)
    wanted = hidden_states(family, folder, stack, tokens)
    assert len(wanted) == depth + 1
    after = seen(lm.load(CPU), tokens)
    before = seen(frozen(folder, stack=stack, hookpoint="resid_pre").load(CPU), tokens)
    for layer in range(depth):
        torch.testing.assert_close(before[layer], wanted[layer], rtol=0, atol=0)
        if layer < depth - 1:
            torch.testing.assert_close(after[layer], wanted[layer + 1], rtol=0, atol=0)
            torch.testing.assert_close(after[layer], before[layer + 1], rtol=0, atol=0)


@pytest.mark.parametrize(("family", "stack"), STACKS)
def test_halves_add_up_to_what_the_block_adds(folder_of, family, stack):
    folder, tokens = folder_of(family), draw_tokens()
    acts = {
        hookpoint: seen(frozen(folder, stack=stack, hookpoint=hookpoint).load(CPU), tokens)
        for hookpoint in HOOKPOINTS
    }
    model = frozen(folder, stack=stack).load(CPU)
    for layer, block in enumerate(model.blocks):
        x, attn, mlp, y = (acts[hookpoint][layer] for hookpoint in HOOKPOINTS)
        assert attn.abs().mean() > 1e-3
        assert mlp.abs().mean() > 1e-3
        assert not torch.allclose(attn, mlp, atol=1e-2)
        cross = cross_attention(model, layer, tokens) if stack == "decoder" else 0
        if family == "bart":
            half = block.self_attn_layer_norm(x + attn)
            if stack == "decoder":
                half = block.encoder_attn_layer_norm(half + cross)
            y_hand = block.final_layer_norm(half + mlp)
        elif family in ("bert", "roberta"):
            half = block.attention.output.LayerNorm(x + attn)
            y_hand = block.output.LayerNorm(half + mlp)
        else:
            y_hand = x + attn + cross + mlp
        torch.testing.assert_close(y_hand, y, rtol=1e-4, atol=1e-4)


def cross_attention(lm, layer, tokens):
    """Return what the cross-attention of a decoder's block adds, from a hook of our own."""
    block, found = lm.blocks[layer], []
    module = {
        "T5Block": lambda: block.layer[1].EncDecAttention,
        "BartDecoderLayer": lambda: block.encoder_attn,
        "T5GemmaDecoderLayer": lambda: block.post_cross_attn_layernorm,
    }[type(block).__name__]()
    handle = module.register_forward_hook(
        lambda _m, _a, out: found.append(out if isinstance(out, torch.Tensor) else out[0])
    )
    lm.run(lm.inputs(tokens), [], lambda *_: None, False)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("hookpoint", ["resid_pre", "mlp_out"])
@pytest.mark.parametrize(("family", "stack"), STACKS)
def test_a_truncated_forward_sees_what_the_full_one_sees_and_stops(
    folder_of, family, stack, hookpoint
):
    lm = frozen(folder_of(family), stack=stack, hookpoint=hookpoint).load(CPU)
    tokens, calls = draw_tokens(), []
    for number, block in enumerate(lm.blocks):
        block.register_forward_hook(lambda *_, number=number: calls.append(number))
    full = seen(lm, tokens, stop=False, layers=[0, 1])
    assert calls == list(range(len(lm.blocks)))
    calls.clear()
    truncated = seen(lm, tokens, stop=True, layers=[0, 1])
    assert set(calls) <= {0, 1}
    assert full.keys() == truncated.keys()
    for layer, acts in full.items():
        assert torch.equal(acts, truncated[layer])


def test_of_an_encoder_decoder_model_the_encoder_alone_runs_when_it_is_the_stack(folder_of):
    for family in PAIRS:
        lm = frozen(folder_of(family), stack="encoder").load(CPU)
        assert not any("decoder" in name.lower() for name, _ in lm.model.named_modules())


def test_the_decoder_reads_the_block_shifted_right_and_the_encoder_the_block(folder_of):
    lm = frozen(folder_of("t5"), stack="decoder").load(CPU)
    tokens = draw_tokens()
    assert lm.read(tokens)[:, 0].tolist() == [1, 1]
    assert torch.equal(lm.read(tokens)[:, 1:], tokens[:, :-1])
    encoder = frozen(folder_of("t5"), stack="encoder").load(CPU)
    assert encoder.read(tokens) is tokens
    # the last token is read by the encoder only: it reaches every position by cross-attention
    changed = tokens.clone()
    changed[:, -1] = 9
    before, after = (seen(lm, t)[0] for t in (tokens, changed))
    assert not torch.equal(before[:, 0], after[:, 0])


@pytest.mark.parametrize("family", ["bert", "modernbert", "t5"])
def test_an_encoder_predicts_nothing_and_a_decoder_does(folder_of, family):
    stack = "encoder" if family in PAIRS else None
    assert not frozen(folder_of(family), stack=stack).load_with_head(CPU).predicts
    assert frozen(folder_of("t5"), stack="decoder").load_with_head(CPU).predicts
    assert frozen(folder_of("multimodal")).load_with_head(CPU).predicts


def runs(lm, context):
    """Return whether a model reads so many tokens."""
    try:
        lm.run(lm.inputs(torch.full((1, context), 9)), [0], lambda *_: None, True)
    except (RuntimeError, IndexError):
        return False
    return True


CONTEXTS = {  # of the families, by their configs; the others have the one of `CONTEXT`
    **dict.fromkeys(["bloom", "t5", "gpt_oss"]),  # ALiBi, relative positions, scaled angles
    "falcon": 2048,
}
HARD = ("gpt2", "opt", "mpt", "bert", "roberta", "bart")  # one more token is an error of the model


@pytest.mark.parametrize(("family", "stack"), STACKS)
def test_a_model_reads_its_context_and_what_has_a_limit_reads_no_more(folder_of, family, stack):
    lm = frozen(folder_of(family), stack=stack)
    most = lm.geometry.context
    assert most == CONTEXTS.get(family, CONTEXT)
    loaded = lm.load(CPU)
    assert runs(loaded, 3 * CONTEXT if most is None else min(most, CONTEXT))
    if most == CONTEXT:  # rotary models would read on, but were never trained to
        assert runs(loaded, most + 1) == (family not in HARD)


GPT = {**NAMES, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 48, "rotary_dim": 4}
DEBERTA = {**GATED, "relative_attention": True}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": CONTEXT}
OTHERS = [
    (GPTJConfig(**GPT), None, 48),
    (CodeGenConfig(**GPT, n_ctx=99), None, 48),
    (FalconConfig(**SMALL, alibi=True), None, None),
    (XLNetConfig(vocab_size=VOCAB, d_model=WIDTH, n_layer=2, n_head=4), None, None),
    (MambaConfig(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2), None, None),
    (T5Config(**NAMES, d_model=WIDTH, num_layers=2, n_positions=32), "decoder", None),
    (DebertaV2Config(**DEBERTA, position_biased_input=False), None, None),
    (DebertaV2Config(**DEBERTA, position_biased_input=True), None, CONTEXT),
    (MPNetConfig(**{**GATED, "max_position_embeddings": CONTEXT + 2}), None, CONTEXT),
    (LED, "encoder", 40),
    (LED, "decoder", 24),
    (LlamaConfig(**SHARED, n_ctx=8), None, CONTEXT),
    (LlamaConfig(**SHARED, rope_parameters={**YARN, "rope_theta": 10_000.0}), None, None),
]


@pytest.mark.parametrize(("config", "stack", "most"), OTHERS)
def test_the_context_of_other_spellings_and_positions(tmp_path, config, stack, most):
    config.save_pretrained(tmp_path)
    assert frozen(tmp_path, stack=stack).geometry.context == most


@pytest.mark.parametrize(
    "key",
    ["n_positions", "max_seq_len", "max_sequence_length", "max_seq_length", "seq_length", "n_ctx"],
)
def test_a_config_may_spell_the_context_in_many_ways(key):
    config = PreTrainedConfig(
        model_type="new", num_hidden_layers=2, hidden_size=8, vocab_size=9, **{key: 77}
    )
    assert geometry_of(config, "decoder", "new").context == 77


def test_positions_of_a_vision_tower_are_no_limit(folder_of):
    assert any(
        "position" in name
        for name, _ in frozen(folder_of("multimodal")).load(CPU).model.named_modules()
    )  # of 4 patches
    assert frozen(folder_of("multimodal")).geometry.context == CONTEXT


def test_a_stack_that_is_missing_or_not_chosen_is_one_sentence(folder_of):
    with pytest.raises(UserError, match=r"model.stack=encoder or model.stack=decoder"):
        frozen(folder_of("t5"))
    with pytest.raises(UserError, match="'encoder', but .* has decoder"):
        frozen(folder_of("llama"), stack="encoder")
    with pytest.raises(UserError, match="'decoder', but .* has encoder"):
        frozen(folder_of("bert"), stack="decoder")
    with pytest.raises(UserError, match="model.stack is 'both', but .* has decoder"):
        frozen(folder_of("llama"), stack="both")


def test_a_hookpoint_that_is_missing_is_one_sentence_that_lists_what_is_there(folder_of):
    with pytest.raises(UserError, match=r"'resid_mid'; use resid_pre, attn_out, mlp_out"):
        frozen(folder_of("llama"), hookpoint="resid_mid")
    with pytest.raises(UserError, match=r"no 'moe'; it has: self_attn, .*mlp.*model.submodule"):
        frozen(folder_of("llama"), hookpoint="mlp_out", submodule="moe")
    with pytest.raises(UserError, match=r"'mlp', but resid_post is the block itself"):
        frozen(folder_of("llama"), submodule="mlp")


def test_a_model_without_attention_lacks_attn_out(tmp_path):
    MambaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4, expand=2
    ).save_pretrained(tmp_path)
    assert frozen(tmp_path).geometry.num_layers == 2
    with pytest.raises(UserError, match=r"block 0 \(MambaBlock\) has no module for attn_out"):
        frozen(tmp_path, hookpoint="attn_out")


def test_names_given_by_hand_are_used(folder_of):
    tokens, folder = draw_tokens(), folder_of("gemma2")
    by_hand = frozen(
        folder, hookpoint="mlp_out", blocks_path="layers", submodule="mlp.down_proj"
    ).load(CPU)
    plain = seen(frozen(folder).load(CPU), tokens)
    raw = seen(by_hand, tokens)
    norm = by_hand.blocks[1].post_feedforward_layernorm
    torch.testing.assert_close(
        norm(raw[1]), seen(frozen(folder, hookpoint="mlp_out").load(CPU), tokens)[1]
    )
    assert raw[1].shape == plain[1].shape
    with pytest.raises(UserError, match=r"'encoder.layer', which names no .*: layers \(3\)"):
        frozen(folder, blocks_path="encoder.layer")
    with pytest.raises(UserError, match=r"mlp_out of block 0 .* \[2, 12, 32\] instead of"):
        seen(frozen(folder, hookpoint="mlp_out", submodule="mlp.up_proj").load(CPU), tokens)


def test_options_of_from_pretrained_are_passed_on_and_recorded(folder_of):
    folder = folder_of("llama")
    lm = frozen(folder, load={"attn_implementation": "eager", "local_files_only": True})
    assert lm.load(CPU).model.config._attn_implementation == "eager"
    assert frozen(folder).load(CPU).model.config._attn_implementation == "sdpa"
    assert lm.described()["load"] == {"attn_implementation": "eager"}
    assert lm.fingerprint() != frozen(folder).fingerprint()
    assert frozen(folder, load={"local_files_only": True}).fingerprint() == (
        frozen(folder).fingerprint()
    )
    for load, sentence in (
        ({"dtype": "float16"}, "model.load contains dtype: leave it out and use model.dtype"),
        ({"token": "secret"}, "contains token.*HF_TOKEN"),
        ({"use_auth_token": "secret"}, "contains use_auth_token.*HF_TOKEN"),
        ({"proxies": {"https": "proxy:80"}}, "contains proxies.*HTTPS_PROXY"),
        ({"adapter_kwargs": [{"token": "secret"}]}, "contains token"),
        ({"mirror": "https://me:secret@host/x"}, "contains an address with a password"),
    ):
        with pytest.raises(UserError, match=sentence) as refused:
            frozen(folder, load=load)
        assert "secret" not in str(refused.value)
    with pytest.raises(UserError, match="use arguments of from_pretrained"):
        check_load_options("eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # within torch's compiler
@pytest.mark.parametrize("hookpoint", HOOKPOINTS)
def test_compiled_blocks_give_the_same_activations(folder_of, hookpoint):
    tokens = draw_tokens()
    plain = seen(frozen(folder_of("llama"), hookpoint=hookpoint).load(CPU), tokens)
    compiled = frozen(folder_of("llama"), hookpoint=hookpoint, compile=True).load(CPU)
    for layer, acts in seen(compiled, tokens).items():
        torch.testing.assert_close(acts, plain[layer], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "stack", "after", "attention", "mlp"),
    [
        ("gpt_neox", None, "layers.1", "attention", "mlp.dense_4h_to_h"),
        ("gpt2", None, "h.1", "attn", "mlp"),
        ("bloom", None, "h.1", "self_attention.dense", "mlp.dense_4h_to_h"),
        ("mpt", None, "blocks.1", "attn", "ffn.down_proj"),
        ("opt", None, "decoder.layers.1", "self_attn", "fc2"),
        ("gemma2", None, "layers.1", "post_attention_layernorm", "post_feedforward_layernorm"),
        ("bert", None, "encoder.layer.1", "attention.output.dense", "output.dense"),
        ("multimodal", None, "language_model.layers.1", "post_attention_layernorm",
         "post_feedforward_layernorm"),
        ("t5", "encoder", "encoder.block.1", "layer.0.SelfAttention", "layer.1.DenseReluDense"),
        ("bart", "decoder", "decoder.layers.1", "self_attn", "fc2"),
    ],
)  # fmt: skip
def test_what_is_hooked_is_kept_by_its_path_in_the_bare_model(
    folder_of, family, stack, after, attention, mlp
):
    places = {"resid_post": after, "attn_out": f"{after}.{attention}", "mlp_out": f"{after}.{mlp}"}
    for hookpoint, path in places.items():
        lm = frozen(folder_of(family), stack=stack, hookpoint=hookpoint)
        assert lm.described()["modules"][1] == path
        lm.load_with_head(CPU)
        assert lm.described()["modules"][1] == path

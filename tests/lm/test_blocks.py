"""Hooks on the blocks of a transformer, against Hugging Face's own hidden states."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    T5Config,
)

from groupsae.lm.blocks import find_blocks
from groupsae.runtime.errors import UserError
from tests.helpers.lms import hooked

LAYERS = 5
SMALL = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0}
CONFIGS = {
    "gpt_neox": GPTNeoXConfig(
        **SMALL, **SPECIAL, intermediate_size=64, vocab_size=97, max_position_embeddings=16
    ),
    "gpt2": GPT2Config(
        **SPECIAL, n_embd=32, n_layer=LAYERS, n_head=4, vocab_size=97, n_positions=16
    ),
    "llama": LlamaConfig(
        **SMALL, **SPECIAL, intermediate_size=64, vocab_size=97, max_position_embeddings=16
    ),
    "opt": OPTConfig(
        **SMALL, **SPECIAL, ffn_dim=64, vocab_size=97, max_position_embeddings=16,
        word_embed_proj_dim=32, pad_token_id=1,
    ),
}  # fmt: skip
FINAL_NORM = {"gpt_neox": "final_layer_norm", "gpt2": "ln_f", "llama": "norm",
              "opt": "decoder.final_layer_norm"}  # fmt: skip


def build(auto, config):
    torch.manual_seed(0)
    model = auto.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():  # so that every layer, norm and bias does something
        parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


@pytest.fixture(params=CONFIGS)
def architecture(request):
    return request.param


@pytest.fixture
def model(architecture):
    return build(AutoModel, CONFIGS[architecture])


@pytest.fixture
def with_head(architecture):
    return build(AutoModelForCausalLM, CONFIGS[architecture])


@pytest.fixture
def tokens():
    return torch.randint(2, 97, (3, 12), generator=torch.Generator().manual_seed(1))


def capture(model, layers, tokens, stop):
    """Return the residuals that a visitor saw, and what the model returned."""
    seen = {}

    def keep(layer, residual):
        seen[layer] = residual.clone()

    return seen, run(model, layers, keep, stop, tokens)


def run(model, layers, visit, stop, tokens):
    lm = hooked(model, LAYERS)
    return lm.run(lm.inputs(tokens), layers, visit, stop)


def count_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_residuals_equal_hidden_states_except_after_the_last_block(model, architecture, tokens):
    hidden = model(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states
    seen, _ = capture(model, range(LAYERS), tokens, stop=False)
    assert list(seen) == list(range(LAYERS))
    for layer in range(LAYERS - 1):
        torch.testing.assert_close(seen[layer], hidden[layer + 1], rtol=0, atol=0)
    assert not torch.allclose(seen[LAYERS - 1], hidden[LAYERS], atol=1e-2)
    norm = model.get_submodule(FINAL_NORM[architecture])
    torch.testing.assert_close(norm(seen[LAYERS - 1]), hidden[LAYERS], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layers", [[0], [1, 3], [4], [3, 0, 3]])
def test_a_truncated_forward_sees_what_the_full_one_sees(model, tokens, layers):
    full, output = capture(model, layers, tokens, stop=False)
    truncated, nothing = capture(model, layers, tokens, stop=True)
    assert output is not None
    assert nothing is None
    assert list(truncated) == list(full) == sorted(set(layers))
    for layer in full:
        assert torch.equal(truncated[layer], full[layer])


def test_no_block_after_the_last_needed_one_runs(model, architecture, tokens):
    calls = []
    blocks = find_blocks(model, LAYERS)
    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
    norm = model.get_submodule(FINAL_NORM[architecture])
    norm.register_forward_pre_hook(lambda *_: calls.append("norm"))
    run(model, [0, 2], lambda *_: None, True, tokens)
    assert calls == [0, 1, 2]
    calls.clear()
    run(model, [LAYERS - 1], lambda *_: None, True, tokens)
    assert calls == [0, 1, 2, 3, 4]
    calls.clear()
    run(model, [0], lambda *_: None, False, tokens)
    assert calls == [0, 1, 2, 3, 4, "norm"]


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_replacing_a_residual_by_itself_leaves_the_logits_as_they_were(with_head, tokens, layer):
    before = with_head(input_ids=tokens, use_cache=False).logits

    def replaced(change):
        visit = lambda _, residual: change(residual)  # noqa: E731
        return run(with_head, [layer], visit, False, tokens).logits

    assert torch.equal(replaced(lambda residual: residual.clone()), before)
    assert torch.equal(replaced(lambda _: None), before)
    assert not torch.allclose(replaced(torch.zeros_like), before, atol=1e-3)
    assert torch.equal(with_head(input_ids=tokens, use_cache=False).logits, before)


def test_a_replacement_is_what_the_next_block_receives(with_head, tokens):
    blocks, new = find_blocks(with_head, LAYERS), torch.randn(3, 12, 32)
    received = []
    blocks[2].register_forward_pre_hook(
        lambda _, args, kwargs: received.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    run(with_head, [1], lambda *_: new, False, tokens)
    assert torch.equal(received[0], new)


@pytest.mark.parametrize("stop", [True, False])
def test_hooks_are_gone_after_success_and_after_an_exception(model, tokens, stop):
    before = count_hooks(model)

    def fail(*_):
        raise RuntimeError("visitor failed")

    with pytest.raises(RuntimeError, match="visitor failed"):
        run(model, [1, 3], fail, stop, tokens)
    assert count_hooks(model) == before
    run(model, [1, 3], lambda *_: None, stop, tokens)
    assert count_hooks(model) == before


def test_a_layer_that_does_not_exist_leaves_no_hook_behind(tokens):
    model = build(AutoModel, CONFIGS["gpt_neox"])
    before = count_hooks(model)
    with pytest.raises(IndexError):
        run(model, [1, 9], lambda *_: None, True, tokens)
    assert count_hooks(model) == before


def test_the_blocks_found_are_the_models_own(model):
    blocks = find_blocks(model, LAYERS)
    assert len(blocks) == LAYERS
    assert len({type(block) for block in blocks}) == 1


def test_a_model_without_fitting_blocks_is_refused_and_the_lists_are_named(tokens):
    model = build(AutoModel, CONFIGS["gpt_neox"])
    with pytest.raises(UserError, match=r"GPTNeoXModel .* 7 blocks.*layers \(5\)"):
        find_blocks(model, 7)
    with pytest.raises(UserError, match="none at all"):
        find_blocks(nn.Linear(2, 2), 3)


def test_a_model_with_two_fitting_lists_is_refused_and_both_are_named():
    def stack():
        return nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])

    model = nn.ModuleDict({"text": stack(), "image": stack()})
    with pytest.raises(UserError, match=r"text \(3\), image \(3\).*model.blocks_path"):
        find_blocks(model, 3)
    assert find_blocks(model, 3, "image") is model["image"]


def test_of_several_fitting_lists_that_of_the_decoder_counts():
    config = T5Config(
        d_model=16, d_ff=32, d_kv=4, num_heads=4, num_layers=3, vocab_size=20,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = build(AutoModel, config)
    assert find_blocks(model, 3) is model.decoder.block


def test_a_path_names_the_blocks_by_hand_with_or_without_the_heads_prefix():
    bare, whole = (build(auto, CONFIGS["llama"]) for auto in (AutoModel, AutoModelForCausalLM))
    for path in ("layers", "model.layers"):
        assert find_blocks(bare, LAYERS, path) is bare.layers
        assert find_blocks(whole, LAYERS, path) is whole.model.layers
    with pytest.raises(UserError, match=r"model.blocks_path is 'transformer.h'.*layers \(5\)"):
        find_blocks(bare, LAYERS, "transformer.h")


def test_lists_inside_the_blocks_do_not_make_them_ambiguous():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(2, 2) for _ in range(4)])

    model = nn.Sequential(nn.ModuleList([Block() for _ in range(4)]))
    assert find_blocks(model, 4) is model[0]

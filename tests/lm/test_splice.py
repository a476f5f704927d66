"""Resuming a model after a block, against full forwards with hooks, over model families."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
)

from groupsae.lm.blocks import find_blocks
from groupsae.lm.hookpoints import HOOKPOINTS
from groupsae.lm.splice import Splicer
from groupsae.runtime.errors import UserError
from tests.helpers.lms import frozen, hooked

LAYERS, VOCAB, WIDTH = 4, 97, 32
NAMES = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "vocab_size": VOCAB}
SMALL = NAMES | {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
GATED = SMALL | {"intermediate_size": 64, "max_position_embeddings": 16}
SHARED = GATED | {"num_key_value_heads": 2}
OLD = NAMES | {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 16}
CONFIGS = {
    "gpt_neox": GPTNeoXConfig(**GATED),
    "gpt_neox_sequential": GPTNeoXConfig(**GATED, use_parallel_residual=False),
    "gpt2": GPT2Config(**OLD),
    "gpt_bigcode": GPTBigCodeConfig(**OLD),
    "gptj": GPTJConfig(**OLD, rotary_dim=4),
    "gpt_neo": GPTNeoConfig(
        **NAMES, hidden_size=WIDTH, num_layers=LAYERS, num_heads=4, max_position_embeddings=16,
        attention_types=[[["global", "local"], 2]], window_size=4,
    ),
    "llama": LlamaConfig(**SHARED),
    "mistral": MistralConfig(**SHARED, sliding_window=4),
    "mixtral": MixtralConfig(**SHARED, num_local_experts=4),
    "qwen2": Qwen2Config(**SHARED),
    "qwen3": Qwen3Config(**SHARED, head_dim=8),
    "gemma2": Gemma2Config(**SHARED, head_dim=8, sliding_window=4),
    "gemma3": Gemma3TextConfig(**SHARED, head_dim=8, sliding_window=4),
    "olmo2": Olmo2Config(**SHARED),
    "phi": PhiConfig(**GATED),
    "phi3": Phi3Config(**GATED),
    "stablelm": StableLmConfig(**SHARED),
    "cohere": CohereConfig(**GATED),
    "opt": OPTConfig(**SMALL, ffn_dim=64, max_position_embeddings=16, word_embed_proj_dim=WIDTH),
    "bloom": BloomConfig(**NAMES, hidden_size=WIDTH, n_layer=LAYERS, n_head=4),
    "falcon": FalconConfig(**SMALL),
    "mpt": MptConfig(**NAMES, d_model=WIDTH, n_layers=LAYERS, n_heads=4, max_seq_len=16),
}  # fmt: skip


def build(config, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():  # so that every layer, norm and bias does something
        parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.to(dtype)


def draw_tokens(seed=1, blocks=3):
    return torch.randint(2, VOCAB, (blocks, 12), generator=torch.Generator().manual_seed(seed))


def replaced_by_a_hook(model, layer, new, tokens):
    """Return the logits of a full forward in which a plain hook replaces one residual."""

    def hook(_module, _args, output):
        return new if isinstance(output, torch.Tensor) else (new, *output[1:])

    handle = find_blocks(model, LAYERS)[layer].register_forward_hook(hook)
    try:
        return model(input_ids=tokens, use_cache=False).logits
    finally:
        handle.remove()


@pytest.fixture(params=CONFIGS)
def family(request):
    return build(CONFIGS[request.param])


@pytest.fixture
def model():
    return build(CONFIGS["gpt_neox"])


def splicer_of(model, hookpoint="resid_post"):
    return Splicer(hooked(model, LAYERS, hookpoint))


def test_the_clean_run_is_the_model_as_it_is(family):
    tokens, layers = draw_tokens(), [0, 2, 3]
    logits, residuals = splicer_of(family).clean(tokens, layers)
    assert torch.equal(logits, family(input_ids=tokens, use_cache=False).logits)
    seen = {}
    lm = hooked(family, LAYERS)
    lm.run(lm.inputs(tokens), layers, seen.__setitem__, False)
    assert list(residuals) == layers
    for layer in layers:
        assert torch.equal(residuals[layer], seen[layer])


def test_resuming_equals_a_full_forward_with_a_hook_bit_for_bit(family):
    splicer, tokens = splicer_of(family), draw_tokens()
    logits, residuals = splicer.clean(tokens, range(LAYERS))
    for layer, residual in residuals.items():
        assert torch.equal(splicer.resume(layer, residual.clone()), logits)
        for new in (residual + torch.randn_like(residual), torch.zeros_like(residual)):
            resumed = splicer.resume(layer, new)
            assert torch.equal(resumed, replaced_by_a_hook(family, layer, new, tokens))
            assert not torch.allclose(resumed, logits, atol=1e-3)
    assert torch.equal(family(input_ids=tokens, use_cache=False).logits, logits)


def test_only_the_blocks_after_the_layer_are_computed(family):
    blocks = find_blocks(family, LAYERS)
    splicer, calls = splicer_of(family), []
    _, residuals = splicer.clean(draw_tokens(), range(LAYERS))
    for number, block in enumerate(blocks):
        for part in block.children():
            part.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
    for layer in range(LAYERS):
        calls.clear()
        splicer.resume(layer, residuals[layer])
        assert set(calls) == set(range(layer + 1, LAYERS))


@pytest.mark.parametrize("hookpoint", ["resid_pre", "attn_out", "mlp_out"])
def test_the_other_hookpoints_resume_as_a_full_forward_with_a_hook(family, hookpoint):
    lm, tokens = hooked(family, LAYERS, hookpoint), draw_tokens()
    splicer = Splicer(lm)
    logits, acts = splicer.clean(tokens, range(LAYERS))
    assert torch.equal(logits, family(input_ids=tokens, use_cache=False).logits)
    for layer, clean in acts.items():
        assert torch.equal(splicer.resume(layer, clean.clone()), logits)
        new = clean + torch.randn_like(clean)
        resumed = splicer.resume(layer, new)
        full = lm.run(lm.inputs(tokens), [layer], lambda *_, new=new: new, False).logits
        assert torch.equal(resumed, full)
        assert not torch.allclose(resumed, logits, atol=1e-3)
        assert torch.equal(splicer.together(lambda *_, new=new: new.double(), [layer]), full)


@pytest.mark.parametrize("hookpoint", HOOKPOINTS)
def test_from_each_hookpoint_only_what_comes_after_it_is_computed(model, hookpoint):
    splicer, calls = splicer_of(model, hookpoint), []
    _, acts = splicer.clean(draw_tokens(), range(LAYERS))
    for number, block in enumerate(model.gpt_neox.layers):
        block.mlp.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
    for layer in range(LAYERS):
        calls.clear()
        splicer.resume(layer, acts[layer])
        assert calls == list(range(layer + (hookpoint == "resid_post"), LAYERS))


def test_a_shorter_and_another_batch_follow_the_last_clean_run(model):
    splicer = splicer_of(model)
    splicer.clean(draw_tokens(), [1])
    tokens = draw_tokens(seed=2, blocks=2)[:, :7]
    logits, residuals = splicer.clean(tokens, [1, 2])
    assert logits.shape == (2, 7, VOCAB)
    assert torch.equal(splicer.resume(2, residuals[2]), logits)
    new = torch.randn(2, 7, WIDTH)
    assert torch.equal(splicer.resume(1, new), replaced_by_a_hook(model, 1, new, tokens))


def test_a_residual_that_is_expanded_or_float64_is_taken_as_the_models_own(model):
    splicer, mean = splicer_of(model), torch.randn(WIDTH, dtype=torch.float64)
    splicer.clean(draw_tokens(), [1])
    full = mean.float().repeat(3, 12, 1)
    assert torch.equal(splicer.resume(1, mean.expand(3, 12, WIDTH)), splicer.resume(1, full))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_take_float32_residuals(dtype):
    model = build(CONFIGS["llama"], dtype)
    splicer, tokens = splicer_of(model), draw_tokens()
    logits, residuals = splicer.clean(tokens, [0, 3])
    assert logits.dtype == residuals[0].dtype == dtype
    assert torch.equal(splicer.resume(0, residuals[0].float()), logits)
    new = residuals[0].float() + torch.randn(3, 12, WIDTH)
    expected = replaced_by_a_hook(model, 0, new.to(dtype), tokens)
    assert torch.equal(splicer.resume(0, new), expected)


def test_together_replaces_every_layer_as_it_comes(family):
    splicer, tokens = splicer_of(family), draw_tokens()
    logits, residuals = splicer.clean(tokens, [0, 2, 3])
    assert torch.equal(splicer.together(lambda _, residual: residual, range(LAYERS)), logits)
    seen = {}

    def shrink(layer, residual):
        seen[layer] = residual.clone()
        return 0.5 * residual

    spliced = splicer.together(shrink, [3, 0, 2])
    assert list(seen) == [0, 2, 3]
    assert torch.equal(seen[0], residuals[0])
    assert not torch.allclose(seen[2], residuals[2], atol=1e-3)
    assert torch.equal(spliced, splicer.resume(3, 0.5 * seen[3]))


def test_one_layer_together_is_that_layer_resumed(model):
    splicer, new = splicer_of(model), torch.randn(3, 12, WIDTH)
    splicer.clean(draw_tokens(), [1])
    assert torch.equal(splicer.together(lambda *_: new.double(), [1]), splicer.resume(1, new))


def test_resuming_before_a_clean_run_is_refused(model):
    splicer = splicer_of(model)
    with pytest.raises(RuntimeError, match="call clean"):
        splicer.resume(0, torch.zeros(3, 12, WIDTH))
    with pytest.raises(RuntimeError, match="call clean"):
        splicer.together(lambda _, residual: residual, [0])


def state_of(model):
    return [(len(m._forward_hooks), m.__dict__.get("forward")) for m in model.modules()]


def test_nothing_stays_on_the_model_after_success_or_failure(model):
    before = state_of(model)
    splicer, tokens = splicer_of(model), draw_tokens()
    splicer.clean(tokens, range(LAYERS))
    splicer.resume(2, torch.zeros(3, 12, WIDTH))
    assert state_of(model) == before
    with pytest.raises(RuntimeError):
        splicer.resume(1, torch.zeros(3, 12, WIDTH + 1))
    with pytest.raises(IndexError):
        splicer.clean(torch.full((1, 3), VOCAB), [0])
    assert state_of(model) == before
    with pytest.raises(RuntimeError, match="call clean"):  # not the tokens of an earlier run
        splicer.resume(1, torch.zeros(3, 12, WIDTH))


def test_a_forward_that_somebody_else_put_on_a_block_comes_back(model):
    block = model.gpt_neox.layers[0]
    original, calls = block.forward, []

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    block.forward = counted
    splicer = splicer_of(model)
    splicer.clean(draw_tokens(), [0])
    calls.clear()
    splicer.resume(0, torch.zeros(3, 12, WIDTH))
    assert block.forward is counted
    assert not calls


class Carrying(nn.Module):
    """A model whose blocks pass on a tensor next to the residual, as `carry` decides."""

    class Block(nn.Module):  # noqa: D106
        def __init__(self, owner):
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)
            self.owner = [owner]

        def forward(self, x, beside):
            owner = self.owner[0]
            if owner.carry == "inside":  # the owner remembers it: nobody outside can see that
                owner.memory.append(x)
                return x + self.linear(x) + 0.1 * sum(owner.memory)
            return x + self.linear(x) + beside, beside + self.linear(x)

    def __init__(self, carry):
        super().__init__()
        self.carry, self.memory = carry, []
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(self.Block(self) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids, use_cache):
        x = self.embed(input_ids)
        beside = torch.zeros_like(x)
        self.memory = []
        for block in self.blocks:
            if self.carry == "inside":
                x = block(x, beside)
            else:
                x, beside = block(x, beside)
        return type("Output", (), {"logits": self.head(x)})


def test_further_outputs_of_blocks_are_those_of_the_clean_run():
    model = Carrying("outside").requires_grad_(False)
    splicer, tokens = splicer_of(model), draw_tokens()
    logits, residuals = splicer.clean(tokens, [1, 2])
    assert torch.equal(splicer.resume(1, residuals[1]), logits)
    new = torch.randn(3, 12, WIDTH)
    assert torch.equal(splicer.resume(2, new), replaced_by_a_hook(model, 2, new, tokens))


def test_a_model_that_hides_something_from_its_blocks_outputs_is_refused():
    model = Carrying("inside").requires_grad_(False)
    splicer = splicer_of(model)
    with pytest.raises(UserError, match=r"Carrying cannot be resumed .*resid_post of block 1,"):
        splicer.clean(draw_tokens(), [1])
    with pytest.raises(UserError):  # and again, not only the first time
        splicer.clean(draw_tokens(), [1])


def test_a_model_that_fails_from_the_middle_is_refused_in_a_sentence(model, monkeypatch):
    splicer = splicer_of(model)

    def fail(*_):
        raise KeyError("no keys of block 0")

    monkeypatch.setattr(splicer, "resume", fail)
    with pytest.raises(UserError, match="ends in KeyError .*no keys of block 0"):
        splicer.clean(draw_tokens(), [2])


def test_logits_that_are_not_finite_are_refused(model):
    model.get_output_embeddings().weight[0] = float("inf")
    with pytest.raises(UserError, match=r"not finite in torch.float32.*bfloat16"):
        splicer_of(model).clean(draw_tokens(), [2])


def test_each_layer_is_checked_once(model):
    splicer, checks = splicer_of(model), []
    check = splicer._check

    def counted(tokens, layers):
        checks.append((len(tokens), layers))
        check(tokens, layers)

    splicer._check = counted
    for layers in ([0, 1], [1, 0], [1], [2, 1], [2]):
        splicer.clean(draw_tokens(), layers)
    assert checks == [(1, [0, 1]), (1, [1, 2])]


def test_a_loaded_model_with_its_head_is_spliced(tiny_lm):
    splicer = Splicer(frozen(tiny_lm).load_with_head(torch.device("cpu")))
    tokens = draw_tokens()
    logits, residuals = splicer.clean(tokens, range(4))
    assert torch.equal(splicer.resume(1, residuals[1]), logits)

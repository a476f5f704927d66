"""What the pretraining of the bundled model starts from."""

import pytest
import torch

from benchmarks.pretraining.model import build_gpt_neox, stack_layers, train_tokenizer


def small(num_layers, seed):
    torch.manual_seed(seed)
    return build_gpt_neox(
        num_layers=num_layers, d_model=16, num_heads=2, vocab_size=40, context=8
    ).eval()


def test_stacked_layers_are_copies_of_the_shallow_ones():
    shallow, deep = small(2, seed=0), small(6, seed=1)
    stack_layers(shallow, deep)
    for i, layer in enumerate(deep.gpt_neox.layers):
        for name, value in layer.state_dict().items():
            source = shallow.gpt_neox.layers[i % 2].state_dict()[name]
            assert torch.equal(value, source)
            assert value.data_ptr() != source.data_ptr()
    for name in ("gpt_neox.embed_in", "gpt_neox.final_layer_norm", "lm_head"):
        ours, theirs = deep.get_submodule(name), shallow.get_submodule(name)
        assert all(
            torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
        )


def test_a_stack_of_the_same_depth_gives_the_same_logits():
    shallow, same = small(3, seed=0), small(3, seed=1)
    tokens = torch.arange(8).reshape(1, 8)
    assert not torch.equal(shallow(tokens).logits, same(tokens).logits)
    stack_layers(shallow, same)
    assert torch.equal(shallow(tokens).logits, same(tokens).logits)


def test_a_stack_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="cannot stack 2 layers into 5"):
        stack_layers(small(2, seed=0), small(5, seed=1))


def test_a_trained_tokenizer_gives_every_text_back():
    tokenizer = train_tokenizer(["def f(x):\n    return x\n"] * 9, vocab_size=280, context=16)
    assert len(tokenizer) <= 280
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 0
    for text in ("def f(y):\n\treturn  y", "grüße, 世界 🙂", " \n leading"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

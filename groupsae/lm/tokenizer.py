"""The tokenizer of a model that has none: transformers makes up an empty one for most of them."""

from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt",
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
)  # fmt: skip
SAMPLE = "The quick brown fox jumps over 13 lazy dogs."


def makes_tokens(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer turns English into more than one token and special ones.

    An empty one gives nothing, or the unknown token for every word.
    """
    ids = tokenizer(SAMPLE, add_special_tokens=False, verbose=False)["input_ids"]
    return len(set(ids) - set(tokenizer.all_special_ids)) > 1


def only_ends(config: Any, vocab_size: int, name: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer that only knows the begin and the end of text, as the config has them.

    Text that is tokenised already needs no more.
    """
    ends = {}
    for key in ("bos_token", "eos_token"):
        number = getattr(config, f"{key}_id", None)
        if type(number) is int and 0 <= number < vocab_size:
            ends[key] = number
    words = {number: key for key, number in ends.items()}
    model = BPE({word: number for number, word in words.items()}, [])
    special = {key: words[number] for key, number in ends.items()}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), name_or_path=name, **special)

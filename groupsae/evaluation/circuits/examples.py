"""The examples of a task as batches of tokens, and the metric of each: how much it is solved."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from groupsae.evaluation.circuits.tasks import Pair


class Batch(NamedTuple):
    """Examples of equal length, so that nothing is padded.

    Attributes:
        numbers: which examples of the task: 2 i and 2 i + 1 are the two directions of pair i.
        clean: the prompts whose answers are wanted.
        patch: the other prompts of their pairs.
        signs: 1 for answers to `clean`, -1 for those to `patch`, 0 for other tokens, up to the
            last that is an answer.
        of_sets: whether an answer is a set of several tokens.
    """

    numbers: Int[Tensor, " example"]
    clean: Int[Tensor, "example pos"]
    patch: Int[Tensor, "example pos"]
    signs: Float[Tensor, "example answer"]
    of_sets: bool

    def metric(self, logits: Float[Tensor, "example pos vocab"]) -> Float64[Tensor, " example"]:
        """Return how much the answers to `clean` are preferred, at the last position.

        For single answers that is the logit difference, LD = z[clean answer] - z[patch answer];
        for sets the difference of probability, sum p(clean answers) - sum p(patch answers).
        """
        last = logits[:, -1].double()
        scores = last.softmax(-1) if self.of_sets else last
        return (scores[:, : self.signs.shape[1]] * self.signs.to(last)).sum(-1)


def batches(
    pairs: Sequence[Pair], size: int, device: torch.device, sides: int = 2
) -> Iterator[Batch]:
    """Yield all examples, at most `size` in a batch; with `sides=1` one direction of each pair."""
    width = 1 + max(token for pair in pairs for each in pair.answers for token in each)
    of_sets = any(len(each) > 1 for pair in pairs for each in pair.answers)
    by_length: dict[int, list[int]] = {}
    for i, pair in enumerate(pairs):
        by_length.setdefault(len(pair.prompts[0]), []).extend(2 * i + s for s in range(sides))
    for numbers in by_length.values():
        for start in range(0, len(numbers), size):
            chosen = numbers[start : start + size]
            signs = torch.zeros(len(chosen), width, device=device)
            for row, number in enumerate(chosen):
                answers = pairs[number // 2].answers
                signs[row, list(answers[number % 2])] = 1.0
                signs[row, list(answers[1 - number % 2])] = -1.0
            clean, patch = (
                [pairs[n // 2].prompts[(n + other) % 2] for n in chosen] for other in (0, 1)
            )
            yield Batch(
                torch.tensor(chosen),
                torch.tensor(clean, device=device),
                torch.tensor(patch, device=device),
                signs,
                of_sets,
            )

"""What the parts of an evaluation get, and what they give.

**To add a part**: docs/architecture.md has the steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from groupsae import __version__
from groupsae.data.activations import ActivationDataModule
from groupsae.data.filters import TokenFilter, both
from groupsae.grouping.groupings import Grouping
from groupsae.grouping.plan import GroupPlan
from groupsae.lm.hooked import HookedLM
from groupsae.runtime.errors import UserError
from groupsae.suite.suite import Suite


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The SAEs that are evaluated, and their language model.

    Attributes:
        saes: by name, each alone, on the device of the evaluation.
        groupings: ways to combine them, the chosen one first.
        lm: the language model, with its head if it has one.
        tokenizer: loads the model's tokenizer.
        filters: which positions are left alone, as in training.
    """

    saes: dict[str, Suite]
    groupings: list[Grouping]
    lm: HookedLM
    tokenizer: Callable[[], PreTrainedTokenizerBase]
    filters: TokenFilter = TokenFilter(None, 0, None)

    def kept(
        self, tokens: Int[Tensor, "block pos"], acts: Float[Tensor, "block pos d_model"]
    ) -> Bool[Tensor, "block pos"] | None:
        """Return the positions at which a layer's activations are replaced; None: all."""
        by_token = self.filters.tokens(self.lm.read(tokens))
        return both(by_token, self.filters.activations(acts))


@dataclass(frozen=True, kw_only=True)
class Run(Subject):
    """The SAEs of a run folder, with the text that they were trained on.

    Attributes:
        folder: the run folder.
        plan: of its `groups.json`.
        data: the language model and the text, on the device of the evaluation.
        say: prints a line for the user.
    """

    folder: Path
    plan: GroupPlan
    data: ActivationDataModule
    say: Callable[[str], None]

    def described(self) -> dict[str, Any]:
        """Return what the results of every part begin with: run, model, text, layers."""
        geometry = self.data.lm.geometry
        return {
            "groupsae": __version__,
            "run": str(self.folder),
            **self.data.described(),
            "text": self.data.blocks.key,
            "num_layers": geometry.num_layers,
            "d_model": geometry.d_model,
            "last_layer": self.plan.last_layer,
            "theta": self.plan.theta,
        }


def chosen_groupings(
    groupings: Sequence[Grouping], names: Sequence[str] | None, key: str
) -> list[Grouping]:
    """Return the groupings that an option names; None: the chosen one and one SAE per layer.

    Raises:
        UserError: one is unknown. `key` is the option.
    """
    known, first = {name: each for each in groupings for name in each.names}, groupings[0]
    if not names:
        return [first, *(g for g in groupings if g.kind == "per_layer" and g is not first)]
    wanted = known if "all" in names else names
    for name in wanted:
        if name not in known:
            raise UserError(f"{key} names {name}; this run has {', '.join(known)}.")
    return list({id(known[name]): known[name] for name in wanted}.values())


class Part(Protocol):
    """A part of an evaluation that says what the model can still do with the SAEs spliced in.

    Its constructor takes the values of its yaml file. (The part `heldout` has more to write, and
    needs a run: `text.py`.)

    Attributes:
        name: of its yaml file in conf/evaluation/, and of its files: evaluation/<name>.json.
    """

    name: ClassVar[str]

    def check(self, data: ActivationDataModule) -> None:
        """Raise UserError where it cannot run, before anything slow; the model is not loaded."""

    def measure(self, subject: Subject) -> dict[str, Any]:
        """Return the results: plain values, and tables as lists of rows, as `save_part` has it.

        The subject may be a `Run`, or a suite and a model of the user's.
        """

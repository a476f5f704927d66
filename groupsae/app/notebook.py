"""The commands as functions, for a notebook or a script: `groupsae.train`, `groupsae.evaluate`."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from groupsae.app.run_folder import finished_run, open_run, register_resolver
from groupsae.config.arguments import arguments_of, composed
from groupsae.config.values import COUNT, at_least, between
from groupsae.files.locks import lock_folder
from groupsae.files.reading import read_json
from groupsae.runtime.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd  # type: ignore[import-untyped,unused-ignore]
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from groupsae.lm.geometry import Geometry
    from groupsae.lm.hooked import HookedLM
    from groupsae.suite.suite import Suite

CONTEXT = 1024  # tokens in a block, as in conf/train.yaml, if the model reads as many
Chosen = str | Mapping[str, Mapping[str, Any]]  # a part of the evaluation, perhaps with values
NUMBERS = {  # what the arguments may be where they are not None
    "tokens": COUNT,
    "context": at_least(2),
    "batch_size": COUNT,
    "resamples": COUNT,
    "level": between(0, 1),
    "seed": at_least(0),
}


class TrainedRun:
    """A run folder: what `groupsae.train` returns.

    Args:
        folder: the run folder.

    Attributes:
        folder: the run folder, as a path.

    >>> run = TrainedRun("outputs/tiny/amad-0.2/1M-topk-k16-x8-s0-0a1b2c3d")
    >>> run.folder.name
    '1M-topk-k16-x8-s0-0a1b2c3d'
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()

    @cached_property
    def suite(self) -> "Suite":
        """The SAEs, loaded on first use; of several groupings the one that was chosen.

        Raises:
            UserError: there are none, or their files are damaged.
        """
        from groupsae.suite.suite import load_suite

        return load_suite(self.folder)

    @property
    def summary(self) -> dict[str, Any]:
        """The figures of the training, `summary.json`.

        Raises:
            UserError: the run is not finished.
        """
        found = read_json(self.folder / "summary.json")
        if found is None:
            raise UserError(
                f"{self.folder} holds no finished run: groupsae.train with the values of a run "
                "resumes it."
            )
        return found

    @property
    def evaluation(self) -> "pd.DataFrame":
        """The figures of the last evaluation, as `evaluate` returns them.

        Raises:
            UserError: the run was not evaluated.
        """
        found = read_json(self.folder / "evaluation" / "evaluation.json")
        if found is None:
            raise UserError(f"{self.folder} was not evaluated: give the run to groupsae.evaluate.")
        return _frame(found)

    def __repr__(self) -> str:
        """Return the folder, the number of SAEs and their FVU."""
        summary = read_json(self.folder / "summary.json")
        if summary is None:
            return f"TrainedRun({str(self.folder)!r}, not finished)"
        fvu = f", FVU {summary['fvu']:.3f}" if "fvu" in summary else ""  # an import has none
        return f"TrainedRun({str(self.folder)!r}, {len(summary['chosen'])} SAEs{fvu})"

    def _repr_html_(self) -> str:
        """Return the table of the SAEs that the command prints."""
        import pandas as pd

        from groupsae.reporting.load import RunFiles
        from groupsae.reporting.tables import groups_table

        summary = read_json(self.folder / "summary.json") or {}
        table = groups_table(RunFiles(summary=summary)) if summary.get("groups") else None
        if table is None:
            return f"<code>{self!r}</code>"
        cells = [[cell.value for cell in row] for row in table.rows]
        frame = pd.DataFrame(cells, columns=[table.heading(c).value for c in table.columns])
        return f"{frame.to_html(index=False, border=0)}<code>{self.folder}</code>"


def train(config: Sequence[str] | Mapping[str, Any] | DictConfig = ()) -> TrainedRun:
    """Train Group-SAEs, or resume them: `python -m groupsae.train` as a function.

    The run folder is that of the command with the same values. A finished run is returned at
    once. Ctrl-C (in a notebook: interrupt the kernel) leaves a checkpoint, and the same call
    resumes it, bit for bit.

    Args:
        config: the arguments of the command, as a list; or as a dict, such as
            `{"model": "tiny", "groups": "count", "groups.num_groups": 3}`, in which values may be
            nested; or a complete configuration, as Hydra's `compose` returns it.

    Returns:
        The run: its folder, its SAEs (loaded on first use) and its figures.

    Raises:
        UserError: a value is not allowed or does not fit the others; what the command would print.
        KeyboardInterrupt: a signal stopped the run, after it left a checkpoint.

    Two steps on the bundled model; without the last four values it is the run of the README:

    >>> run = train({
    ...     "model": "tiny", "groups": "count", "groups.num_groups": 3,
    ...     "tokens": 4_096, "calibration.tokens": 4_096, "stream.heldout_tokens": 4_096,
    ...     "stream.max_tokens": 1_000_000,
    ... })  # doctest: +ELLIPSIS
    tiny: 12 layers, d_model 128; 4,096 tokens per SAE in 8 steps of 512
    ...
    >>> run.summary["num_groups"], run.suite.layers[-1], run.folder.parts[:3]
    (3, 11, ('outputs', 'tiny', 'count-3'))
    """
    register_resolver()
    if isinstance(config, DictConfig):
        cfg, arguments = config.copy(), []
        lacking = [key for key in composed([], "train") if key not in cfg]
        if lacking:
            raise UserError(
                f"the configuration lacks {', '.join(map(str, lacking))}: give a complete one, as "
                "Hydra composes it from groupsae's files, or a dict of the values that differ."
            )
    elif isinstance(config, str):
        raise UserError(f"{config!r} is one text: give a list of arguments, [{config!r}].")
    else:
        arguments = list(arguments_of(config) if isinstance(config, Mapping) else config)
        cfg = composed(arguments, "train")
    with open_run(cfg, arguments) as run, warnings.catch_warnings():
        from groupsae.app.fit import fit  # slow imports only after the cheap checks

        if fit(run):
            raise KeyboardInterrupt("a signal stopped the run; the same call resumes it")
    return TrainedRun(run.folder)


def evaluate(
    suite: "Suite | TrainedRun | str | Path",
    model: "PreTrainedModel | None" = None,
    texts: Iterable[str] | None = None,
    *,
    evaluation: Chosen = "heldout",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    tokens: int | None = None,
    context: int | None = None,
    mean_texts: Iterable[str] | None = None,
    together: bool = False,
    batch_size: int = 8,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> "pd.DataFrame":
    r"""Return what the SAEs lose, and how that affects the language model.

    A suite is evaluated on a model and texts in hand; a run, or its folder, as
    `python -m groupsae.evaluate` does it: on the held-out text of the run, with the files, tables
    and default values of the command. No other argument is needed then.

    Every SAE is measured on each of its layers, and spliced into the model there, one layer at a
    time. Which tokens count (special tokens, first positions, extreme norms) is as in training,
    and so is the context, unless one is given.

    Another part of the evaluation is chosen by its name, such as `evaluation="circuits"`, or with
    values of its yaml file: `evaluation={"circuits": {"tasks": ["quote", "indent"]}}`. For a suite
    it needs the model, and of the other arguments only the tokenizer.

    Args:
        suite: the SAEs, or a run.
        model: the language model that they were trained on, with its head.
        evaluation: the part of the evaluation.
        texts: one document each, not among those of the training. The intervals resample them.
        tokenizer: of the model; None loads the one from where the model is from.
        tokens: at most so many; None reads all texts.
        context: tokens in a block; None: as in training.
        mean_texts: texts for the mean of each layer, which `ce_score_mean` compares with; None
            takes `texts`, where the command takes its calibration split.
        together: also splice all layers at once: `frame.attrs["groupings"]`.
        batch_size: blocks in one forward of the model.
        resamples: bootstrap resamples of the documents.
        level: confidence level of the intervals.
        seed: seed of the resamples.

    Returns:
        A row for each SAE and layer. Columns: `sae`, `layer`, and every metric of the command's
        `results.csv` with the ends of its interval (`fvu`, `fvu_low`, `fvu_high`); `mse` is in
        squared units of the raw activations, `ce`, `delta_ce` and `kl` are nats per token,
        `delta_ce_percent` is per cent, the rest are shares or counts. `frame.attrs` holds the
        rest of the command's `evaluation.json`, such as `attrs["ce"]`, the model's own loss.
        Of another part: a row for each grouping, and its other tables in `frame.attrs`.

    Raises:
        UserError: the model has another width or depth than the SAEs' own, or is on another
            device; the texts fill no block; a number is not allowed; the run is not finished.

    >>> text = "def area(width, height):\n    return width * height\n" * 40
    >>> found = groupsae.evaluate(suite, model, [text], tokenizer=tokenizer)
    >>> found.loc[0, "sae"], found.shape[0] == len(suite.layers)
    ('layers.0-10', True)
    """
    if isinstance(suite, TrainedRun | str | Path):
        if model is not None or texts is not None:
            raise UserError(
                "a run is evaluated with its own model and text: give only the run, or run.suite "
                "with a model and texts."
            )
        run = suite if isinstance(suite, TrainedRun) else TrainedRun(suite)
        return _evaluate_run(run, evaluation)
    if model is None or (texts is None and evaluation == "heldout"):
        raise UserError(
            "a suite is evaluated on a model and texts: evaluate(suite, model, texts)."
        )
    if evaluation != "heldout":
        return _evaluate_part(suite, model, tokenizer, evaluation)
    assert texts is not None
    _check_numbers(
        tokens=tokens, context=context, batch_size=batch_size, resamples=resamples, level=level,
        seed=seed,
    )  # fmt: skip
    from groupsae.data.filters import TokenFilter
    from groupsae.evaluation.given import evaluate_suite, layer_means
    from groupsae.evaluation.intervals import Bootstrap

    trained = suite.cfg
    tokenizer = _tokenizer_of(model) if tokenizer is None else tokenizer
    with _hooked_as_trained(suite, model) as (lm, size):
        pack = partial(
            _packed,
            model=model,
            tokenizer=tokenizer,
            size=size,
            context=trained.get("context") if context is None else context,
            prepend_bos=trained.get("prepend_bos", False),
        )
        blocks, documents = pack(texts, tokens=tokens)
        averaged = blocks if mean_texts is None else pack(mean_texts, tokens=None)[0]
        filters = TokenFilter.recorded(trained, tokenizer.all_special_ids, lm.start_token)
        found = evaluate_suite(
            suite,
            lm,
            blocks,
            layer_means(lm, averaged, suite.layers, filters, batch_size),
            filters,
            Bootstrap(documents, resamples, level, seed),
            batch_size=batch_size,
            together=together,
        )
    return _frame(found)


def angular_distances(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: Iterable[str],
    *,
    hookpoint: str = "resid_post",
    stack: str | None = None,
    blocks_path: str | None = None,
    submodule: str | None = None,
    tokens: int | None = None,
    context: int | None = None,
    prepend_bos: bool = False,
    centring: str = "none",
    batch_size: int = 8,
) -> "np.ndarray":
    r"""Return the mean angle between the activations of each pair of layers, in fractions of pi.

    d(i, j) = mean over tokens of arccos(cos(x_i, x_j)) / pi (arXiv 2410.21508, 3.1): what training
    measures before it groups the layers, for any Hugging Face model. `choose` takes the result.

    Args:
        model: the language model, with or without its head; it runs where it is.
        tokenizer: of the model.
        texts: one document each, packed into blocks without padding.
        hookpoint: activations to compare: resid_post, resid_pre, mlp_out or attn_out.
        stack: `encoder` or `decoder` of a model that has both.
        blocks_path: path of the list of blocks; None searches for it.
        submodule: path within a block of attn_out's or mlp_out's module; None searches for it.
        tokens: at most so many; None reads all texts.
        context: tokens in a block; None: 1,024, or what the model reads if that is less.
        prepend_bos: start every block with BOS.
        centring: `none` (the paper's formula), or `mean`: the mean over the texts is subtracted
            from each layer first, in two passes.
        batch_size: blocks in one forward of the model.

    Returns:
        Float64 [L, L], symmetric, with a zero diagonal.

    Raises:
        UserError: the model lacks the stack, blocks or hookpoint, an activation is not finite,
            the texts fill no block, or a number is not allowed.

    >>> text = "def area(width, height):\n    return width * height\n" * 40
    >>> distances = groupsae.angular_distances(model, tokenizer, [text])
    >>> distances.shape, groupsae.choose(distances[:-1, :-1], theta=0.2).num_groups
    ((12, 12), 2)
    """
    _check_numbers(tokens=tokens, context=context, batch_size=batch_size)
    import torch

    from groupsae.grouping.angles import AngularDistance
    from groupsae.grouping.moments import LayerMoments
    from groupsae.runtime.progress import token_progress

    place = {"stack": stack, "blocks_path": blocks_path, "submodule": submodule}
    with _hooked(model, hookpoint=hookpoint, **place) as (lm, size):
        blocks, _ = _packed(
            texts,
            model=model,
            tokenizer=tokenizer,
            size=size,
            context=context,
            prepend_bos=prepend_bos,
            tokens=tokens,
        )
        layers = range(size.num_layers)
        angles = AngularDistance(num_layers=size.num_layers, centring=centring).to(blocks.device)
        metrics: list[LayerMoments | AngularDistance] = [angles]
        if centring == "mean":
            moments = LayerMoments(num_layers=size.num_layers, d_model=size.d_model)
            metrics.insert(0, moments.to(blocks.device))
        with (
            torch.no_grad(),
            token_progress(
                "measuring layers", len(metrics) * blocks.numel(), stderr=True
            ) as advance,
        ):
            for metric in metrics:
                if centring == "mean" and metric is angles:
                    angles.set_mean(moments.moments().mean)
                for part in blocks.split(batch_size):
                    found = lm.acts(part, layers)
                    rows = [found[layer].flatten(0, 1).to(blocks.device) for layer in layers]
                    metric.update(torch.stack(rows))
                    advance(part.numel())
    return angles.distances().cpu().numpy()


# ---- a model and texts in hand --------------------------------------------------------------


def _check_numbers(**given: Any) -> None:
    for name, value in given.items():
        plain = value.item() if hasattr(value, "item") else value  # of numpy
        if value is not None and not NUMBERS[name].holds(plain):
            raise UserError(f"{name} is {value!r}; it must be {NUMBERS[name].words}.")


@contextmanager
def _hooked(model: "PreTrainedModel", **place: Any) -> "Iterator[tuple[HookedLM, Geometry]]":
    """Hook a model while inside, with everything in it out of training mode (dropout)."""
    from groupsae.lm.load import hook_model

    hooked = hook_model(model, **place)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield hooked
    finally:
        for module in training:
            module.training = True


@contextmanager
def _hooked_as_trained(
    suite: "Suite", model: "PreTrainedModel"
) -> "Iterator[tuple[HookedLM, Geometry]]":
    """Hook a model where a suite was trained; UserError if it cannot be the one."""
    from groupsae.lm.attached import check_fits

    trained = suite.cfg
    recorded = {key: trained.get(key) for key in ("stack", "blocks_path", "submodule")}
    with _hooked(model, hookpoint=trained.get("hookpoint", "resid_post"), **recorded) as hooked:
        check_fits(trained, suite.d_model, max(suite.layers), hooked[1], type(model).__name__)
        if suite.device != model.device:
            raise UserError(
                f"the SAEs are on {suite.device} and the model is on {model.device}: move one of "
                f"them, such as suite.to('{model.device}')."
            )
        yield hooked


def _packed(
    texts: Iterable[str],
    *,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    size: "Geometry",
    context: int | None,
    prepend_bos: bool,
    tokens: int | None,
) -> "tuple[Tensor, np.ndarray]":
    """Return the blocks on the device of the model, and the document that each begins in."""
    import torch

    from groupsae.data.packing import pack_texts

    most = size.context
    if context is not None and most is not None and context > most:
        raise UserError(f"context is {context}, but this model reads at most {most} tokens.")
    blocks, documents = pack_texts(
        texts,
        tokenizer,
        context=min(CONTEXT, most or CONTEXT) if context is None else context,
        vocab_size=size.vocab_size,
        prepend_bos=prepend_bos,
        tokens=tokens,
    )
    return torch.from_numpy(blocks).to(model.device), documents


def _tokenizer_of(model: "PreTrainedModel") -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model.name_or_path)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            "no tokenizer is found where the model is from: give tokenizer=, such as the second "
            "result of suite.load_model()."
        ) from error


# ---- runs -----------------------------------------------------------------------------------


def _evaluate_run(run: TrainedRun, evaluation: Chosen) -> "pd.DataFrame":
    cfg = _command_for(run.folder, evaluation)
    trained = finished_run(run.folder, trusted=cfg.trust_remote_code)
    from groupsae.app.evaluate import evaluate

    with lock_folder(run.folder), warnings.catch_warnings():
        (found,) = evaluate(run.folder, trained, cfg.evaluation, cfg.device).values()
    return _frame(found)


def _evaluate_part(
    suite: "Suite",
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    evaluation: Chosen,
) -> "pd.DataFrame":
    """Return what a part other than `heldout` finds for a suite and a model in hand."""
    from groupsae.app.evaluate import parts_of
    from groupsae.data.filters import TokenFilter
    from groupsae.evaluation.given import alone
    from groupsae.evaluation.parts import Subject
    from groupsae.evaluation.text import Heldout

    (part,) = parts_of(_command_for(Path("suite"), evaluation).evaluation)
    if isinstance(part, Heldout):
        raise UserError("heldout takes its values as arguments: evaluate(suite, model, texts).")
    tokenizer = _tokenizer_of(model) if tokenizer is None else tokenizer
    with _hooked_as_trained(suite, model) as (lm, _):
        saes, grouping = alone(suite)
        subject = Subject(
            saes=saes,
            groupings=[grouping],
            lm=lm,
            tokenizer=lambda: tokenizer,
            filters=TokenFilter.recorded(suite.cfg, tokenizer.all_special_ids, lm.start_token),
        )
        return _frame(part.measure(subject))


def _command_for(folder: Path, evaluation: Chosen) -> DictConfig:
    """Return the configuration of the command that evaluates a folder with one part."""
    names = [evaluation] if isinstance(evaluation, str) else list(evaluation)
    if len(names) != 1:
        raise UserError(f"evaluation names {len(names)} parts: give one in a call.")
    arguments = {"run": folder, "evaluation": names[0]}
    if isinstance(evaluation, Mapping):
        where = "evaluation" if names == ["heldout"] else f"evaluation.{names[0]}"
        arguments |= {where: evaluation[names[0]]} if evaluation[names[0]] else {}
    return composed(list(arguments_of(arguments)), "evaluate")


def _frame(found: Mapping[str, Any]) -> "pd.DataFrame":
    """Return the results of a part of an evaluation as a table, the rest as its `attrs`."""
    import pandas as pd

    from groupsae.evaluation.files import flat

    rows = "results" if "results" in found else "groupings"
    frame = pd.DataFrame([flat(row) for row in found[rows]])
    frame.attrs = {key: value for key, value in found.items() if key != rows}
    return frame

"""The commands as Python functions, for a notebook or a script: `groupsae.train`."""

import json
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from groupsae.app.run_folder import open_run, register_resolver
from groupsae.config.arguments import arguments_of, composed
from groupsae.files.reading import require_json
from groupsae.runtime.errors import UserError

if TYPE_CHECKING:
    from groupsae.suite.suite import Suite


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
        self.folder = Path(folder)

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
        return require_json(self.folder / "summary.json")

    def __repr__(self) -> str:
        """Return the folder, the number of SAEs and their FVU."""
        if not (self.folder / "summary.json").exists():
            return f"TrainedRun({str(self.folder)!r}, not finished)"
        summary = self.summary
        return (
            f"TrainedRun({str(self.folder)!r}, {len(summary['chosen'])} SAEs, "
            f"FVU {summary['fvu']:.3f})"
        )

    def _repr_html_(self) -> str:
        """Return the table of the SAEs that the command prints."""
        import pandas as pd  # type: ignore[import-untyped,unused-ignore]

        from groupsae.reporting.load import RunFiles
        from groupsae.reporting.tables import groups_table

        path = self.folder / "summary.json"
        table = (
            groups_table(RunFiles(summary=json.loads(path.read_text()))) if path.exists() else None
        )
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
    tiny: 12 layers, d_model 128; 4,096 tokens per SAE in 2 steps of 2,048
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

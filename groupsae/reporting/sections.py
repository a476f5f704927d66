"""The sections of one run on the page: which figures, tables and facts stand where."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from groupsae.reporting.formatting import NONE, duration, percent
from groupsae.reporting.load import RunFiles
from groupsae.reporting.page_runs import groups_table, ledger_tables, trained_table
from groupsae.reporting.page_tables import (
    Table,
    groupings_table,
    layers_table,
    saes_table,
    scale_table,
    similarity_table,
    together_table,
    variants_table,
)
from groupsae.reporting.verdict import Verdict, judge


@dataclass
class Section:
    """A part of the page; whatever is empty is left out.

    Attributes:
        id: for links.
        title: heading.
        intro: a paragraph.
        verdict: of the summary.
        figures: images of the page.
        tables: below the figures.
        facts: names and values.
        text: preformatted, shown on demand.
        text_title: what it is.
    """

    id: str
    title: str
    intro: str = ""
    verdict: Verdict | None = None
    figures: list[Any] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    text: str = ""
    text_title: str = ""

    @property
    def empty(self) -> bool:
        """Return whether there is nothing to show."""
        content = (self.intro, self.verdict, self.figures, self.tables, self.facts, self.text)
        return not any(content)


def run_sections(run: RunFiles, images: Sequence[tuple[str, Any]]) -> list[Section]:
    """Return the sections that have something in them.

    Args:
        run: the run.
        images: (section, image) of its figures, in order.
    """

    def of(section: str) -> list[Any]:
        return [image for name, image in images if name == section]

    shared, trained = _some(groups_table(run)), _some(trained_table(run))
    sections = [
        Section("summary", "Summary", verdict=judge(run)),
        Section("groups", "Layers and groups", figures=of("groups"), tables=shared),
        Section(
            "quality",
            "What sharing costs",
            intro=_quality_intro(run),
            figures=of("quality"),
            tables=_some(groupings_table(run), together_table(run)),
        ),
        Section(
            "layers",
            "Layer by layer",
            figures=of("layers"),
            tables=_some(
                layers_table(run), scale_table(run), variants_table(run), similarity_table(run)
            ),
        ),
        Section("latents", "Latents", figures=of("latents"), tables=_some(saes_table(run))),
        Section("training", "Training", figures=of("training"), tables=trained),
        Section("cost", "Cost ledger", intro=_cost_intro(run), tables=ledger_tables(run)),
        Section(
            "provenance",
            "Configuration and provenance",
            facts=provenance(run),
            text=run.config_text,
            text_title="Full configuration",
        ),
    ]
    return [section for section in sections if not section.empty]


def provenance(run: RunFiles) -> list[tuple[str, str]]:
    """Return where the run and its figures come from."""
    summary, measured, e = run.summary or {}, run.measured, run.evaluation or {}
    facts: list[tuple[str, Any]] = [
        ("run folder", run.folder),
        ("adopted from", run.adopted)
        if run.adopted
        else ("command", " ".join(["python -m groupsae.train", *run.overrides])),
        ("model", run.model),
        ("revision", measured.get("revision") or e.get("revision")),
        ("weights", measured.get("weights")),
        ("text", measured.get("text")),
        ("distances from", _count(measured.get("tokens"), "calibration tokens")),
        ("context", _count(measured.get("context"), "tokens")),
        ("centring", measured.get("centring")),
        ("training tokens per SAE", _count(summary.get("tokens"), "")),
        (
            "training time",
            duration(summary["seconds_training"]) if summary.get("seconds_training") else None,
        ),
        ("speed", _count(round(summary.get("tokens_per_second") or 0), "tokens/s")),
        (
            "peak memory",
            f"{summary['peak_memory_gb']:.1f} GB" if summary.get("peak_memory_gb") else None,
        ),
        ("held-out tokens", _count(e.get("tokens"), "")),
        ("special tokens", _special(e)),
        ("first positions left out", e.get("skip_positions") or None),
        ("norms left out", e.get("max_norm_ratio") and f"above {e['max_norm_ratio']:g} medians"),
        ("intervals", _intervals(e)),
        ("groupsae", summary.get("groupsae") or e.get("groupsae")),
    ]
    return [(name, str(value)) for name, value in facts if value not in (None, "", NONE)]


def _quality_intro(run: RunFiles) -> str:
    if run.evaluation is None or len(run.groupings) > 1:
        return ""
    return (
        "This run has one grouping, so quality cannot be set against the number of groups or "
        "against baselines. A run with groups=all trains every number of groups, one SAE per "
        "layer and smaller SAEs from one stream."
    )


def _cost_intro(run: RunFiles) -> str:
    if run.ledger is None:
        return ""
    device = str(run.ledger.get("device", "")).upper()
    threads = run.ledger.get("threads")
    where = f"{device}, {threads} threads" if device == "CPU" and threads else device
    tokens, saes = run.ledger.get("tokens"), run.ledger.get("num_saes")
    return (
        f"Planned by the cost model and measured in this run ({where}; {saes} SAEs, "
        f"{tokens:,} tokens each)."
        if tokens
        else ""
    )


def _special(e: dict[str, Any]) -> str | None:
    if "exclude_special_tokens" not in e:
        return None
    return "left out of all averages" if e["exclude_special_tokens"] else "counted as any other"


def _intervals(e: dict[str, Any]) -> str | None:
    b = e.get("bootstrap")
    if not b:
        return None
    return (
        f"{percent(b['level'], 0)}, {b['resamples']:,} bootstrap resamples of {e['documents']:,} "
        f"documents, seed {b['seed']}"
    )


def _count(value: int | None, unit: str) -> str | None:
    return f"{value:,} {unit}".strip() if value else None


def _some(*tables: Table | None) -> list[Table]:
    return [table for table in tables if table is not None]

"""What a run shows, in sentences made from its numbers."""

from dataclasses import dataclass, field
from shlex import quote
from typing import NamedTuple

from groupsae.reporting.comparison import against_in_words, change_in_words, saving
from groupsae.reporting.formatting import (
    NAMES,
    TIGHT,
    UNIT,
    number,
    percent,
    plural,
    spans,
    within,
)
from groupsae.reporting.load import Interval, RunFiles, interval
from groupsae.reporting.quality import cost_of


class Tile(NamedTuple):
    """One figure that sums something up: what it is, its value, and a note."""

    label: str
    value: str
    note: str


class Finding(NamedTuple):
    """What the numbers say about one question, in a sentence or two."""

    title: str
    text: str


@dataclass
class Verdict:
    """The summary at the top of a report.

    Attributes:
        headline: one sentence.
        tiles: the main figures.
        findings: what the numbers say.
        caveats: what they do not say.
    """

    headline: str
    tiles: list[Tile] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    caveats: list[str] = field(default_factory=list)


def judge(run: RunFiles) -> Verdict:
    """Return the verdict on one run."""
    saved, verdict = saving(run), Verdict(headline="")
    num_saes, layers = len(run.saes), sum(map(len, run.saes.values()))
    trained = f"{plural(num_saes, 'SAE')} for {plural(layers, 'layer')}"
    loss = (run.chosen or {}).get("against_per_layer") or {}
    fvu, delta_ce = interval(loss.get("fvu")), interval(loss.get("delta_ce"))
    if run.summary is None and run.evaluation is None:
        verdict.headline = "This run is not finished: it has no SAEs yet."
    elif saved is None or num_saes == layers:
        verdict.headline = f"{trained}."
    elif saved < 0:
        verdict.headline = (
            f"{trained} cost {percent(-saved)} more FLOPs than one SAE per layer: at this budget "
            "measuring the distances costs more than sharing saves."
        )
    else:
        verdict.headline = f"{trained} save {percent(saved)} of the FLOPs of one SAE per layer"
        verdict.headline += f"; {_loss_in_words(run, fvu)}." if fvu is not None else "."
    verdict.tiles = _tiles(run, saved, fvu, delta_ce)
    verdict.findings = [
        Finding(title, text)
        for title, text in (
            ("Groups", _choice(run)),
            ("Quality", _cost_of_sharing(run, fvu, delta_ce)),
            ("The number of groups", _neighbours(run)),
            ("Against even spacing", against_in_words(run, "even")),
            ("Against smaller SAEs", against_in_words(run, "smaller")),
            ("Saved", _saved(run, saved)),
        )
        if text
    ]
    verdict.caveats = _caveats(run)
    return verdict


def _loss_in_words(run: RunFiles, fvu: Interval) -> str:
    if fvu.sign == 0 and fvu.low is not None:
        return "no difference in FVU can be made out"
    word = "rises" if fvu.value > 0 else "falls"
    ends = [
        value.value
        for grouping in (run.per_layer, run.chosen)
        if (value := interval(((grouping or {}).get("grouped_layers") or {}).get("fvu")))
    ]
    tail = f", from {number(ends[0], 3)} to {number(ends[1], 3)}" if len(ends) == 2 else ""
    return f"FVU {word} by {number(abs(fvu.value), 3)}{tail}"


def _tiles(
    run: RunFiles, saved: float | None, fvu: Interval | None, delta_ce: Interval | None
) -> list[Tile]:
    amad = (run.chosen or run.plan).get("amad")
    tiles = []
    if run.groups and not run.adopted:
        note = "no AMAD" if amad is None else f"AMAD {number(amad, 3)}"
        tiles.append(Tile("groups", str(len(run.groups)), note))
    means = (run.chosen or {}).get("grouped_layers") or {}
    for metric, lost in (("fvu", fvu), ("delta_ce", delta_ce)):
        value = lost or interval(means.get(metric))
        if value is None and metric == "fvu" and run.summary is not None:
            value = interval(run.summary.get("fvu"))
        if value is not None:
            sign = "+" if lost is not None and value.value > 0 else ""
            low, high = value.bounds
            note = f"{number(low, 4)} to {number(high, 4)}" if low < high else "held-out text"
            label = f"{NAMES[metric]}{UNIT[metric].replace(TIGHT, ', ')}"
            label += " against one SAE per layer" if lost is not None else ""
            tiles.append(Tile(label, sign + number(value.value, 3), note))
    if saved is not None:
        tiles.append(Tile("FLOPs saved", percent(saved), "of one SAE per layer"))
    return tiles


def _choice(run: RunFiles) -> str:
    if run.adopted:
        return f"Trained elsewhere and adopted from {run.adopted}: their angles are not known."
    if not run.groups:
        return ""
    chosen = run.chosen or run.plan
    groups = f"{plural(len(run.groups), 'group')} of layers ({spans(run.groups)})"
    last = run.plan.get("last_layer")
    tail = {
        "own": " The last layer has an SAE of its own.",
        "skip": " The last layer has no SAE.",
    }.get(str(last), "")
    amad = f"AMAD {number(chosen['amad'], 4)}" if chosen.get("amad") is not None else ""
    if run.theta is not None and (chosen.get("chosen_by") or run.chosen is None):
        return f"AMAD below θ = {run.theta:g} chose {groups}, with {amad}.{tail}"
    return f"The run has {groups}{', ' + amad if amad else ''}.{tail}"


def _cost_of_sharing(run: RunFiles, fvu: Interval | None, delta_ce: Interval | None) -> str:
    if run.evaluation is None:
        return (
            "What the SAEs do to the language model was not measured yet: "
            f"python -m groupsae.evaluate {quote(f'run={run.folder}')}"
        )
    if run.chosen is None:
        return ""
    if fvu is None:
        means = run.chosen["grouped_layers"]
        share = within(means["delta_ce_percent"], "delta_ce_percent")
        absent = (
            ""
            if run.chosen["kind"] == "per_layer"
            else " One SAE per layer was not trained beside, so what sharing costs cannot be "
            "said: groups=all trains the baselines."
        )
        raised = (
            f"; their reconstruction in place of one layer raises the cross-entropy by "
            f"{within(means['delta_ce'], 'delta_ce')} nats per token ({share}{TIGHT}%)"
            if interval(means["delta_ce"])
            else " (the model predicts no next token, so it has no cross-entropy)"
        )
        where = "" if run.adopted else " of the grouped layers"
        return (
            f"On held-out text the SAEs{where} leave an FVU of {within(means['fvu'], 'fvu')}"
            f"{raised}.{'' if run.adopted else absent}"
        )
    percentage = interval(run.chosen["against_per_layer"].get("delta_ce_percent"))
    points = f" ({within(percentage, 'delta_ce_percent')} percentage points)" if percentage else ""
    parts = [change_in_words("FVU", fvu, "fvu")]
    if delta_ce is not None:
        parts.append(change_in_words("ΔCE", delta_ce, "delta_ce") + points)
    return f"Sharing against one full-width SAE per layer: {'; '.join(parts)}."


def _neighbours(run: RunFiles) -> str:
    """Say what one group fewer or more of the same rule would have given."""
    chosen = run.chosen
    if chosen is None or not chosen.get("rules"):
        return ""
    own, rule, parts = interval(chosen["grouped_layers"]["fvu"]), chosen["rules"][0], []
    for step, words in ((-1, "one group fewer"), (1, "one more")):
        for other in run.groupings:
            if other["num_groups"] == chosen["num_groups"] + step and rule in other["rules"]:
                fvu, cost = interval(other["grouped_layers"]["fvu"]), cost_of(other)
                if fvu is not None and own is not None and cost is not None:
                    parts.append(f"{words} gives FVU {number(fvu.value, 4)} at {percent(cost)}")
    if not parts or own is None:
        return ""
    here = percent(cost_of(chosen))
    return (
        f"With the same rule, {' and '.join(parts)} of the per-layer cost (chosen: "
        f"{number(own.value, 4)} at {here})."
    )


def _saved(run: RunFiles, saved: float | None) -> str:
    if saved is None or len(run.saes) == sum(map(len, run.saes.values())):
        return ""
    cost = (run.chosen or {}).get("cost") or {}
    stored = (run.ledger or {}).get("saving") or {}
    paper = 1 - cost["paper"] if cost.get("paper") is not None else stored.get("paper_both_sides")
    seconds = 1 - cost["seconds"] if cost.get("seconds") is not None else stored.get("seconds")
    text = (
        f"Saved against one SAE per layer at equal tokens: {percent(saved)} of the FLOPs, with "
        "the language model's forward pass, what measuring took and the last layer counted"
    )
    text += f"; {percent(seconds)} of the seconds" if seconds is not None else ""
    if paper is not None:
        text += f"; {percent(paper)} as the paper counts, with the last layer on both sides"
    sharing = (run.ledger or {}).get("sharing")
    if sharing:
        text += (
            f". One run for each of the {sharing['groupings']} groupings would take "
            f"{number(sharing['factor'], 1)} times as long as all from one stream"
        )
    return text + "."


def _caveats(run: RunFiles) -> list[str]:
    caveats = []
    if run.evaluation is not None:
        e = run.evaluation
        level = e.get("bootstrap", {}).get("level", 0.95)
        caveats.append(
            f"Measured on {e['tokens']:,} held-out tokens, {plural(e['sequences'], 'sequence')} "
            f"from {plural(e['documents'], 'document')}, by {e['model']}. Intervals are "
            f"{percent(level, 0)} bootstrap intervals over these documents: they tell how far the "
            "text matters, not how far another seed would."
        )
    if run.adopted:
        return caveats
    seed = "" if run.seed is None else f" (seed {run.seed})"
    tokens = (run.summary or {}).get("tokens")
    budget = f", {tokens / 1e6:g} million tokens per SAE" if tokens else ""
    caveats.append(
        f"This is one training run{seed}{budget}. Several seeds and a larger model are needed "
        "before a small difference means anything in general."
    )
    return caveats

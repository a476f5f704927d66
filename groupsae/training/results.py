"""What a finished run writes into its folder: the SAEs, and a summary of its figures."""

import resource
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch

from groupsae import __version__
from groupsae.data.activations import ActivationDataModule
from groupsae.suite.suite import save_sae
from groupsae.training.callbacks.grouping import GroupLayers
from groupsae.training.callbacks.throughput import Throughput
from groupsae.training.suite import GroupSAESuite


def save_suite(
    folder: Path,
    suite: GroupSAESuite,
    grouping: GroupLayers,
    data: ActivationDataModule,
    configured: Mapping[str, Any],
) -> None:
    """Write the SAE of every group that this process holds into `saes/<group>/`.

    `configured` is the configuration's `sae`, as plain values.
    """
    plan, measurement = grouping.plan, grouping.measurement
    for index, member in zip(suite.own, suite.members(), strict=True):
        arguments = {
            "d_model": member.sae.d_model,
            **{k: v for k, v in configured.items() if not str(k).startswith("_")},
            "expansion": None,
            "d_sae": member.sae.d_sae,
        }
        save_sae(
            folder / "saes" / member.name,
            member.sae,
            {
                "architecture": configured["_target_"],
                "arguments": arguments,
                "d_sae": member.sae.d_sae,
                "width": plan.members[index].width,
                "layers": member.layers,
                "norm_factors": {x: float(member.norm_factors[x]) for x in member.layers},
                **data.described(),
                "commit": data.lm.commit,
                "weights": measurement.provenance["weights"],
                "text": measurement.provenance["text"],
                "copies": data.copies,
                "stream": data.split_described(),
                "tokens": int(member.tokens_per_layer.sum()) // data.rows_per_token(member.layers),
                "rows": int(member.tokens_per_layer.sum()),
                "groupsae": __version__,
            },
        )


def summarise(
    folder: Path,
    trainer: L.Trainer,
    suite: GroupSAESuite,
    grouping: GroupLayers,
    throughput: Throughput,
) -> dict[str, Any]:
    """Return the figures of a finished run, of all processes' SAEs."""
    values = {name: float(value) for name, value in trainer.callback_metrics.items()}
    groups = {}
    for planned in grouping.plan.members:
        result = suite.val_results[planned.name]
        groups[planned.name] = {
            "layers": planned.layers,
            "rows": sum(result["tokens_per_layer"].values()),
            **{key: result[key] for key in ("tokens_per_layer", "dead", "skipped")},
            **{key: values[f"val/{key}/{planned.name}"] for key in ("fvu", "l0", "unfired")},
            "fvu_per_layer": {x: found["fvu"] for x, found in result["per_layer"].items()},
        }
    part, first = grouping.plan.partition, grouping.plan.members[0]
    tokens = groups[first.name]["rows"] // grouping.work.rows_per_token(len(first.layers))
    return {
        "folder": str(folder),
        "groups": groups,
        "chosen": grouping.plan.names,
        "fvu": values["val/fvu/mean"],
        "num_groups": part.num_groups,
        "amad": part.amad,
        "max_diameter": part.max_diameter,
        "size_weighted_amad": part.size_weighted_amad,
        "variance": part.variance,
        **grouping.recorded(),
        "tokens": tokens,
        "layers_per_token": grouping.work.layers_per_token,
        "steps": trainer.global_step,
        "tokens_per_second": throughput.overall(),
        "seconds_training": throughput.total_seconds,
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "peak_gpu_memory_gb": torch.cuda.max_memory_allocated() / 2**30,  # 0 without a GPU
        "cost": asdict(grouping.cost),
        "groupsae": __version__,
    }

"""A small run whose latents were interpreted, made once a session."""

from functools import cache
from pathlib import Path

from hydra import compose, initialize_config_dir

from groupsae.app.run_folder import register_resolver
from groupsae.config.instantiate import CONF
from tests.helpers.runs import overrides, run

OPTIONS = (
    "interpretation.groupings=all",
    "interpretation.latents=8",
    "interpretation.explain_tokens=6144",
    "interpretation.score_tokens=6144",
    "interpretation.top=6",
)


@cache
def interpreted(lm: Path, text: Path, base: Path) -> Path:
    """Return the folder of a run, with layers that have maps, interpreted by the command."""
    arguments = overrides(
        lm, text, base / "interpreted", "groups=count", "groups.num_groups=2",
        "sae.layer_bias=per_layer", "sae.layer_rank=2",
    )  # fmt: skip
    status, folder = run(arguments)
    assert status == 0
    interpret(folder)
    return folder


def interpret(folder: Path, *arguments: str) -> None:
    """Interpret as the command line would, in this process."""
    from groupsae.interpret import interpret as command

    register_resolver()
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        command(compose("interpret", [f"run={folder}", "device=cpu", *OPTIONS, *arguments]))

"""What names a run, and which runs of earlier versions are still found, resumed and evaluated."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from groupsae.config.identity import FORMAT, content_hash
from tests.helpers.callbacks import TARGET, act
from tests.helpers.runs import composed, config_of, overrides, run, saved


def hash_of(*arguments: str) -> str:
    return content_hash(OmegaConf.to_container(composed(list(arguments)), resolve=False))


# what was default before: larger steps of the bundled model; angles and biases as in the paper
EARLIER = (
    "stream.exclude_special_tokens=false",
    "calibration.centring=none",
    "b_dec_start=zero",
)
STEPS = ("stream.blocks_per_step=8", "eval_every=150")


@pytest.mark.parametrize(
    ("argument", "name"),
    [
        ("groups=amad", "0328b95c"),
        ("model=pythia-160m", "ccd3d26b"),
        ("sae=gated", "f88327eb"),
        ("experiment=replication", "b2dc2d2b"),
        ("+trainer.limit_train_batches=3", "a9fa96e9"),
        ("data.cache=x", "004c5084"),
    ],
)
def test_run_folders_of_earlier_versions_are_found_by_the_same_command(
    argument: str, name: str
) -> None:
    steps = STEPS if not argument.startswith(("model=", "experiment=")) else ()
    assert hash_of(argument, *EARLIER, *steps) == name


def test_of_the_callbacks_only_a_users_own_decides_the_result() -> None:
    ours = hash_of()
    assert hash_of("callbacks=none") == hash_of("~callbacks.bar") == ours
    assert hash_of("callbacks.checkpoints.save_top_k=2") == ours
    assert hash_of(*act(do="SIGTERM")) != ours


def test_a_run_of_an_earlier_version_is_resumed(
    tiny_lm: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its configuration had no callbacks, and options that are none."""
    arguments = overrides(tiny_lm, tiny_text, tmp_path)
    status, whole = run([*arguments, f"output={tmp_path / 'whole'}"])
    assert status == 0
    monkeypatch.setenv("GROUPSAE_TARGETS", TARGET)
    status, folder = run([*arguments, "checkpoint_every=2", *act(do="SIGTERM")])
    assert status == 143
    cfg = config_of(folder)
    assert list(cfg)[-1] == "run_format"
    assert cfg.run_format == FORMAT
    del cfg["callbacks"]
    cfg.trainer.precision = "32-true"
    OmegaConf.save(cfg, folder / ".hydra" / "config.yaml")
    assert run([f"resume={folder}"]) == (0, folder)
    ours, theirs = saved(folder), saved(whole)
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == tensor).all() for name, tensor in theirs.items())


def test_a_run_without_bar_figures_and_checkpoints_still_ends_with_one(
    tiny_lm: Path, tiny_text: Path, tmp_path: Path
) -> None:
    status, folder = run([*overrides(tiny_lm, tiny_text, tmp_path), "callbacks=none"])
    assert status == 0
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step=6.ckpt"]
    assert not (folder / "figures" / "amad.png").exists()
    assert not list(folder.rglob("lightning_logs"))

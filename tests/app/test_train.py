"""The main job, on a small random model and text that the tests made."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import groupsae
from tests.helpers.runs import overrides, read_checkpoint, run, saved, stopped


@pytest.fixture(scope="module")
def finished(tiny_lm: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    status, folder = run(overrides(tiny_lm, tiny_text, tmp_path_factory.mktemp("out")))
    assert status == 0
    return folder


def test_a_run_leaves_everything_it_promises(finished: Path) -> None:
    for name in (
        "groups.json",
        "angles.npz",
        "metrics.csv",
        "summary.json",
        "ledger.json",
        ".hydra/config.yaml",
        ".hydra/overrides.yaml",
        "figures/distances.png",
        "figures/amad.png",
        "figures/training.png",
        "checkpoints/step=6.ckpt/manifest.json",
    ):
        assert (finished / name).stat().st_size > 0, name
    assert list(finished.glob("saes/*/cfg.json"))


def test_the_folder_is_named_by_content_and_not_by_the_clock(finished: Path) -> None:
    model, grouping, name = finished.parts[-3:]
    assert model.startswith("lm")
    assert grouping == "amad-0.2"
    assert name.startswith("0.003072M-topk-k4-x2-s0-")


def test_every_sae_sees_the_token_budget_and_each_layer_its_share(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    for group in summary["groups"].values():
        assert sum(group["tokens_per_layer"].values()) == 3072
    assert summary["tokens"] == 3072


def test_the_saved_suite_reconstructs_as_well_as_in_validation(
    finished: Path, tiny_lm: Path, tiny_text: Path
) -> None:
    from groupsae.data.activations import ActivationDataModule
    from groupsae.data.files import FileSource
    from tests.helpers.lms import frozen

    summary = json.loads((finished / "summary.json").read_text())
    data = ActivationDataModule(
        lm=frozen(tiny_lm),
        source=FileSource(path=str(tiny_text), text_column=None),
        cache=str(finished.parents[2] / "cache"),
        context=64,
        heldout_fraction=0.1,
        calibration_fraction=0.1,
        prepend_bos=False,
        exclude_special_tokens=False,
        skip_positions=0,
        max_norm_ratio=None,
        max_tokens=1_200_000_000,
        blocks_per_step=8,
        blocks_per_forward=4,
        tokens=3072,
        heldout_tokens=1024,
        num_workers=0,
        seed=0,
    )
    data.setup("validate")
    suite = groupsae.load_suite(finished)
    parts = [
        data.activations(b, [[layer] for layer in suite.layers]).acts
        for b in data.val_dataloader()
    ]
    acts = torch.cat(parts, dim=1).double()
    for layer, x in zip(suite.layers, acts, strict=True):
        x_hat = suite.reconstruct(x.float(), layer)
        fvu = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
        summarised = summary["groups"][suite.group_of(layer)]["fvu_per_layer"][str(layer)]
        assert float(fvu) == pytest.approx(summarised, rel=1e-4)


def test_a_finished_run_is_shown_again_and_not_repeated(
    finished: Path, tiny_lm: Path, tiny_text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "summary.json").stat().st_mtime_ns
    status, folder = run(overrides(tiny_lm, tiny_text, finished.parents[2]))
    assert (status, folder) == (0, finished)
    assert (finished / "summary.json").stat().st_mtime_ns == before
    assert "finished before" in capsys.readouterr().out


def test_three_steps_a_stop_and_three_more_equal_six_bit_for_bit(
    finished: Path,
    tiny_lm: Path,
    tiny_text: Path,
    tmp_path: Path,
) -> None:
    status, folder = stopped(overrides(tiny_lm, tiny_text, tmp_path))
    assert status == 128 + signal.SIGTERM
    assert not (folder / "summary.json").exists()

    status, again = run([f"resume={folder}"])
    assert (status, again) == (0, folder)
    whole, parts = saved(finished), saved(folder)
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name
    checkpoints = [read_checkpoint(f / "checkpoints" / "step=6.ckpt") for f in (finished, folder)]
    for name, tensor in checkpoints[0]["state_dict"].items():
        torch.testing.assert_close(
            tensor, checkpoints[1]["state_dict"][name], rtol=0, atol=0, equal_nan=True
        )
    steps = [
        line.split(",")[0]
        for line in (folder / "metrics.csv").read_text().splitlines()
        if ",tokens_seen," in line
    ]
    assert steps == [str(s) for s in range(6)]


def test_a_signal_after_the_summary_leaves_a_complete_run_and_says_so(
    tiny_lm: Path,
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        "groupsae.app.fit.print_ledger", lambda *_: signal.raise_signal(signal.SIGTERM)
    )
    arguments = overrides(tiny_lm, tiny_text, tmp_path / "my runs", "evaluate=true")
    status, folder = run(arguments)
    assert status == 143
    printed = capsys.readouterr().out
    assert f"The run is complete: {folder}" in printed
    assert f"to evaluate it:\n  python -m groupsae.evaluate 'run={folder}'" in printed
    (folder / "summary.json").unlink()
    assert run(arguments[:-1]) == (0, folder)
    assert f"The run is complete: {folder}" in capsys.readouterr().out


def test_sigkill_loses_nothing_before_the_last_checkpoint(
    finished: Path, tiny_lm: Path, tiny_text: Path, tmp_path: Path
) -> None:
    script = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); from tests.helpers import runs\n"
        "from groupsae.training.callbacks.throughput import Throughput\n"
        "old = Throughput.on_train_batch_end\n"
        "def kill(self, trainer, *a):\n"
        "    old(self, trainer, *a)\n"
        "    if trainer.global_step == 5: os.kill(os.getpid(), 9)\n"
        "Throughput.on_train_batch_end = kill\n"
        "runs.run(sys.argv[2:])\n"
    )
    arguments = overrides(tiny_lm, tiny_text, tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).parents[2]), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    status, folder = run(arguments)  # the same command again finds the checkpoint of step 3
    assert status == 0
    for name, tensor in saved(finished).items():
        assert torch.equal(tensor, saved(folder)[name]), name


def test_two_processes_give_what_one_gives(
    finished: Path, tiny_lm: Path, tiny_text: Path, tmp_path: Path
) -> None:
    arguments = overrides(
        tiny_lm,
        tiny_text,
        tmp_path,
        "trainer=ddp",
        "trainer.accelerator=cpu",
        "trainer.devices=2",
        "logger=none",
    )
    done = subprocess.run(
        [sys.executable, "-m", "groupsae.train", *arguments],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (p.parent for p in tmp_path.rglob("summary.json"))
    assert folder.name == finished.name
    plans = [json.loads((f / "groups.json").read_text()) for f in (finished, folder)]
    assert plans[0]["saes"] == plans[1]["saes"]
    assert plans[0]["plan"]["amad"] == pytest.approx(plans[1]["plan"]["amad"], abs=1e-7)
    summaries = [
        json.loads((f / "summary.json").read_text())["groups"] for f in (finished, folder)
    ]
    for name, group in summaries[0].items():
        assert group["tokens_per_layer"] == summaries[1][name]["tokens_per_layer"]
        assert group["fvu"] == pytest.approx(summaries[1][name]["fvu"], rel=1e-3)
    for name, tensor in saved(finished).items():
        # float32 sums in another order, through six Adam steps of up to 1e-3 * 16 each
        torch.testing.assert_close(tensor, saved(folder)[name], rtol=1e-3, atol=1e-4)


def test_training_learns(tiny_lm: Path, tiny_text: Path, tmp_path: Path, finished: Path) -> None:
    status, folder = run(
        overrides(
            tiny_lm,
            tiny_text,
            tmp_path,
            "tokens=102400",
            "eval_every=200",
            "checkpoint_every=200",
            "log_every=50",
        )
    )
    assert status == 0
    short, long = (json.loads((f / "summary.json").read_text())["fvu"] for f in (finished, folder))
    assert long < 0.7 * short


def test_a_sweep_over_group_counts_measures_the_layers_once(
    tiny_lm: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import groupsae.training.measure as measure

    passes = []
    original = measure.LayerMoments

    def counted(**kwargs):  # noqa: ANN003, ANN202
        passes.append(1)
        return original(**kwargs)

    monkeypatch.setattr(measure, "LayerMoments", counted)
    folders = set()
    for count in (1, 2):
        status, folder = run(
            overrides(
                tiny_lm,
                tiny_text,
                tmp_path,
                "groups=count",
                f"groups.num_groups={count}",
                "tokens=512",
            )
        )
        assert status == 0
        folders.add(folder)
        assert json.loads((folder / "groups.json").read_text())["plan"]["num_layers"] == 4
    assert len(folders) == 2
    assert len(passes) == 1


def test_pythia_conf_names_the_hub() -> None:
    from tests.helpers.runs import composed

    cfg = composed(["model=pythia-1b", "groups=amad"])
    assert (cfg.model.name, cfg.data.name) == (
        "EleutherAI/pythia-1b",
        "NeelNanda/pile-small-tokenized-2b",
    )
    assert cfg.tokens == 1_000_000_000

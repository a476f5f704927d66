"""Bad input is refused in one sentence that names the value and the way out."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from groupsae.app.run_folder import open_run
from groupsae.config.arguments import composed as config_of
from groupsae.runtime.errors import UserError
from groupsae.runtime.ranks import check_processes
from groupsae.train import train
from tests.helpers.runs import composed, overrides, read_checkpoint, rewrite_checkpoint, run


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "groupsae.train", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("argument", ["sae.kk=3", "groups.rule=[complete,even]", "tasks=[code]"])
def test_the_command_line_answers_with_one_sentence_and_status_2(
    argument: str, tmp_path: Path
) -> None:
    done = command(argument, f"output={tmp_path}")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["model=pythia-1bb"], "Available options in 'model': base hf"),
        (["tokns=5"], "tokns is unknown. Did you mean tokens?"),
        (["sae.kk=3"], "sae.kk is unknown. Did you mean sae.k"),
        (["groups=count", "groups.theta=0.3"], "groups.theta is unknown"),
        (["theta=0.3"], "Did you mean groups.theta?"),
        (["grups=amad"], "Did you mean groups"),
        (["trainer.max_epochs=3"], "added: +trainer.max_epochs=<value>"),
        (["groups.theta=0.2 b("], "such as \"key='value'\"."),
        (["outputs/tiny"], "a run folder is run=<folder>"),
        (["evaluation=[heldout,circuit]"], "Could not load 'evaluation/circuit'"),
        (["evaluation.circuits.steps=3"], "It is of evaluation=circuits: choose that."),
        (["groups.theta=0.1,0.2"], "which is a sweep"),
    ],
)
def test_an_unknown_argument_is_named_with_the_nearest_ones(
    arguments: list[str], sentence: str
) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        config_of(arguments, "train")


def test_a_refused_command_leaves_no_run_folder(
    tiny_lm: Path, tiny_text: Path, tmp_path: Path
) -> None:
    """Such a folder could neither be finished nor evaluated."""
    arguments = overrides(tiny_lm, tiny_text, tmp_path, "sae.k=1000")
    with pytest.raises(UserError, match="sae.k is 1000"):
        train(composed(arguments), arguments)
    assert not list(tmp_path.rglob(".hydra"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["groups.theta=0"], "theta"),
        (["groups.theta=1.5"], "theta"),
        (["groups.rule=compleet"], "complete"),
        (["stream.max_norm_ratio=1"], "stream.max_norm_ratio is 1; it must be a number above 1"),
        (["stream.max_norm_ratio=.nan"], "stream.max_norm_ratio is"),
        (["stream.max_norm_ratio=true"], "stream.max_norm_ratio is True"),
        (["tokens=0"], "tokens is 0"),
        (["tokens=lots"], "tokens is 'lots'"),
        (
            ["tokens=100"],
            "less than one step of stream.blocks_per_step=8 blocks of 64 tokens: "
            "give at least 512",
        ),
        (["stream.heldout_fraction=0.9"], "stream.heldout_fraction is 0.9"),
        (["stream.context=4096"], "reads at most 64"),
        (["stream.max_tokens=0"], "stream.max_tokens is 0; it must be an integer of at least 1"),
        (["calibration.centring=median"], "none"),
        (["sae.k=1000"], "sae.k is 1000"),
        (["model.dtype=float3"], "float32"),
        (["model.name=./no/such-model"], "cannot load model './no/such-model'"),
        (["groups=count", "groups.num_groups=9"], "9"),
        (["groups=explicit", "groups.groups=[[0,1],[1,2]]"], "1"),
        (["groups=explicit", "groups.groups=[[0],[2]]"], "1"),
        (["groups=all", "groups.rules=[]"], "groups.rules is"),
        (["groups=all", "groups.rules=[even,compleet]"], "rule is 'compleet': use complete"),
        (["groups=all", "groups.smaller=[1,3]"], "groups.smaller holds 3: use integers"),
        (
            ["groups=all", "groups.smaller=[1]", "sae.expansion=0.2"],
            "the smaller SAE layers.0.smaller-1: sae.k is 4",
        ),
        (["data.path=/no/such/folder"], "/no/such/folder"),
        (["+trainer.barebones=true"], "Lightning refuses this trainer (`Trainer(barebones=True"),
        (
            ["trainer=ddp", "trainer.strategy.timeout_minutes=0"],
            "timeout_minutes is 0",
        ),
        (["data.cache=README.md"], "data.cache is 'README.md'; it must be a folder"),
        (
            ["stream.blocks_per_forward=0"],
            "stream.blocks_per_forward is 0; it must be an integer",
        ),
        (["stream.blocks_per_step=3000", "tokens=1000000"], "less than one step of 3000"),
    ],
)
def test_bad_values_are_named_before_training_starts(
    arguments: list[str], sentence: str, tiny_lm: Path, tiny_text: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        run(overrides(tiny_lm, tiny_text, tmp_path, *arguments))
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("variables", "command"),
    [
        ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2"}, "torchrun"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "srun"),
    ],
)
def test_processes_that_would_not_know_of_each_other_are_refused(
    variables: dict[str, str],
    command: str,
    tiny_lm: Path,
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    arguments = overrides(tiny_lm, tiny_text, tmp_path)
    with pytest.raises(UserError, match=f"{command} started 2 processes, but this trainer is for"):
        train(composed(arguments), arguments)
    assert not list(tmp_path.iterdir())
    check_processes(composed([*arguments, "trainer=ddp"]).trainer)
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")  # a shell of so many tasks
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    check_processes(composed(arguments).trainer)


def test_a_run_of_several_processes_is_resumed_by_its_folder_alone(
    tiny_lm: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer comes from the run; the command line has the default one."""
    arguments = overrides(tiny_lm, tiny_text, tmp_path, "trainer=ddp")
    with open_run(composed(arguments), arguments) as opened:
        folder = opened.folder
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    resume = [f"resume={folder}"]
    with open_run(composed(resume), resume) as opened:
        assert "strategy" in opened.cfg.trainer


def test_a_file_that_is_not_text_is_named(tiny_lm: Path, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "picture.txt").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00" * 50)
    with pytest.raises(UserError, match=r"picture\.txt"):
        run(overrides(tiny_lm, tmp_path / "text", tmp_path / "out"))


def test_a_folder_that_cannot_be_written_is_named(
    tiny_lm: Path, tiny_text: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="output=<folder>"):
        run(overrides(tiny_lm, tiny_text, tmp_path / "file"))


def test_a_small_corpus_becomes_epochs_and_says_so(
    tiny_lm: Path, tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = tmp_path / "text"
    few.mkdir()
    for file in sorted(tiny_text.glob("*.txt"))[:12]:
        shutil.copy(file, few)
    status, _ = run(
        overrides(
            tiny_lm,
            few,
            tmp_path / "out",
            "tokens=30720",
            "stream.heldout_tokens=512",
            "stream.heldout_fraction=0.2",
            "stream.calibration_fraction=0.2",
            "eval_every=999",
            "log_every=99",
        )
    )
    assert status == 0
    assert "times the training text" in capsys.readouterr().out


@pytest.fixture
def half(tiny_lm: Path, tiny_text: Path, tmp_path: Path) -> Path:
    """Return a run folder with a checkpoint and no result."""
    status, folder = run(overrides(tiny_lm, tiny_text, tmp_path))
    assert status == 0
    (folder / "summary.json").unlink()
    return folder


def test_resume_refuses_another_config_and_partition(half: Path) -> None:
    with pytest.raises(UserError, match="tokens=9999 differs"):
        run([f"resume={half}", "tokens=9999"])
    with pytest.raises(UserError, match="groups=even differs"):
        run([f"resume={half}", "groups=even", "groups.num_groups=2"])
    with pytest.raises(UserError, match="no run there"):
        run([f"resume={half.parent}"])

    newest = half / "checkpoints" / "step=6.ckpt"
    rewrite_checkpoint(newest, {**read_checkpoint(newest), "plan": "f" * 64})
    with pytest.raises(UserError, match="holds the partition ffffffff"):
        run([f"resume={half}"])


def test_overwrite_starts_again_and_nothing_else_does(half: Path) -> None:
    arguments = (half / ".hydra" / "overrides.yaml").read_text().splitlines()
    arguments = [a.removeprefix("- ").strip("'") for a in arguments]
    with open_run(composed(arguments), arguments) as opened:
        assert opened.checkpoint is not None
    with open_run(composed([*arguments, "overwrite=true"]), arguments) as opened:
        assert opened.folder == half
        assert opened.checkpoint is None
    assert not (half / "checkpoints").exists()


def test_a_non_finite_activation_is_named_with_its_layer(
    tiny_lm: Path, tiny_text: Path, tmp_path: Path
) -> None:
    from transformers import GPTNeoXForCausalLM

    broken = tmp_path / "lm"
    shutil.copytree(tiny_lm, broken)
    lm = GPTNeoXForCausalLM.from_pretrained(tiny_lm)
    with torch.no_grad():
        lm.gpt_neox.layers[2].mlp.dense_4h_to_h.bias[0] = torch.nan
    lm.save_pretrained(broken)
    with pytest.raises(UserError, match="layer 2"):
        run(overrides(broken, tiny_text, tmp_path / "out"))


def test_a_loss_that_becomes_nan_stops_the_run_and_keeps_the_checkpoints(
    tiny_lm: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from groupsae.data.activations import ActivationDataModule

    original = ActivationDataModule.on_after_batch_transfer

    def poisoned(self, batch, dataloader_idx):  # noqa: ANN001, ANN202
        made = original(self, batch, dataloader_idx)
        if self.trainer.training and self.trainer.global_step >= 4:
            made.acts[0, 0, 0] = torch.nan
        return made

    monkeypatch.setattr(ActivationDataModule, "on_after_batch_transfer", poisoned)
    with pytest.raises(UserError, match="not a finite number at step"):
        run(overrides(tiny_lm, tiny_text, tmp_path))
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert checkpoint.name == "step=3.ckpt"
    state = read_checkpoint(checkpoint)["state_dict"]
    assert all(t.isfinite().all() for name, t in state.items() if "sae." in name)


def test_a_finished_run_is_not_shown_for_text_that_has_changed(
    tiny_lm: Path, tiny_text: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    shutil.copytree(tiny_text, text)
    arguments = overrides(tiny_lm, text, tmp_path / "out")
    assert run(arguments)[0] == 0
    (text / "000.txt").write_text("other words\n" * 200)
    with pytest.raises(UserError, match="other values of text"):
        run(arguments)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["groups=count"], "groups.num_groups has no default"),
        (["output=/dev/null/x"], "(output=<folder>)"),
    ],
)
def test_the_command_line_names_a_missing_value_and_a_folder_that_cannot_be(
    arguments: list[str], sentence: str
) -> None:
    done = command(*arguments)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1

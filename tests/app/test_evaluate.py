"""The command that evaluates a run: what it leaves behind, what it logs, and what it refuses."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from safetensors.torch import load_file, save_file

from groupsae.evaluation.results import AVERAGED
from groupsae.files.reading import read_metrics
from groupsae.reporting.page import write_report
from groupsae.runtime.errors import UserError
from tests.helpers.evaluated import KINDS, evaluate, evaluated, read, set_option, without_seconds
from tests.helpers.runs import composed, config_of, overrides, run
from tests.helpers.wandb_files import recorded, values

Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tiny_lm: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return lambda kind: evaluated(kind, tiny_lm, tiny_text, tmp_path_factory.getbasetemp())


@pytest.fixture
def copy(folder: Folder, tmp_path: Path) -> Path:
    """Return a copy of an evaluated run."""
    return Path(shutil.copytree(folder("ordinary"), tmp_path / "run"))


def comparable(evaluation: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in without_seconds(evaluation).items() if k != "run"}


# ---- the results ------------------------------------------------------------------------------


def test_the_command_evaluates_a_run_and_prints_the_results(copy: Path) -> None:
    at_the_end_of_training = read(copy)
    shutil.rmtree(copy / "evaluation")
    done = subprocess.run(
        [sys.executable, "-m", "groupsae.evaluate", f"run={copy}", "evaluation.together=true"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "1,024 held-out tokens" in done.stdout
    printed, found = " ".join(done.stdout.split()), read(copy)
    assert f"Results: {copy / 'evaluation'}" in printed
    assert f"CE is {found['ce']['value']:.4f} nats" in printed
    together = found["groupings"][0]["spliced_together"]
    assert f"{together['ce']['value']:.4f}" in printed
    rows = {name: value for _, name, value in read_metrics(copy / "metrics.csv")}
    assert rows["eval/delta_ce_together/complete-2"] == together["delta_ce"]["value"]
    assert comparable(read(copy)) == comparable(at_the_end_of_training)
    assert read(copy)["run"] == str(copy)


def test_evaluating_again_gives_the_same_and_replaces_its_own_rows_only(copy: Path) -> None:
    before, files = read(copy), {p.relative_to(copy) for p in copy.rglob("*")}
    rows = read_metrics(copy / "metrics.csv")
    mine = [row for row in rows if row[1].startswith("eval/")]
    steps = json.loads((copy / "summary.json").read_text())["steps"]
    assert {step for step, _, _ in mine} == {steps + 1}
    of_a_layer = len(before["results"][0]) - 2  # without its SAE and number
    logged = 4 * (of_a_layer + 2) + len(AVERAGED) + 4 + 1  # ablated; together; clean CE
    assert len({name for _, name, _ in mine}) == len(mine) == logged
    assert max(step for step, name, _ in rows if not name.startswith("eval/")) <= steps

    assert comparable(evaluate(copy, "evaluation.together=true")) == comparable(before)
    assert read_metrics(copy / "metrics.csv") == rows
    evaluate(copy, "evaluation.tokens=512", "evaluation.together=true")
    fewer = read_metrics(copy / "metrics.csv")
    assert read(copy)["tokens"] == 512
    assert [row[:2] for row in fewer] == [row[:2] for row in rows]
    assert [r for r in fewer if not r[1].startswith("eval/")] == [r for r in rows if r not in mine]
    assert [r for r in fewer if r[1].startswith("eval/")] != mine
    lock = Path(".hydra/lock")  # a command's, which stays
    assert {p.relative_to(copy) for p in copy.rglob("*")} - {lock} == files - {lock}


def test_what_is_logged_is_what_the_json_says(folder: Folder) -> None:
    evaluation = read(folder("all"))
    rows = read_metrics(folder("all") / "metrics.csv")
    logged = {name: value for _, name, value in rows if name.startswith("eval/")}
    for each in evaluation["groupings"]:
        assert logged[f"eval/kl/{each['name']}"] == each["all_layers"]["kl"]["value"]
    assert logged["eval/ce/clean"] == evaluation["ce"]["value"]
    assert logged["eval/ce_zero/layer.2"] == evaluation["layers"][2]["ce_zero"]["value"]
    chosen = evaluation["groupings"][0]["sae_of_layer"]
    for each in evaluation["results"]:
        if chosen[str(each["layer"])] == each["sae"]:
            assert logged[f"eval/fvu/layer.{each['layer']}"] == each["fvu"]["value"]
            assert logged[f"eval/delta_ce/layer.{each['layer']}"] == each["delta_ce"]["value"]


def test_loggers_can_be_left_out(copy: Path) -> None:
    (copy / "metrics.csv").unlink()
    evaluate(copy, "logger=none")
    assert not (copy / "metrics.csv").exists()


def test_a_finished_run_started_again_with_evaluate_is_only_evaluated(
    tiny_lm: Path, tiny_text: Path, folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    finished = folder("ordinary")
    before = comparable(read(finished))
    kept = {p: p.stat().st_mtime_ns for p in finished.glob("saes/*/sae.safetensors")}
    shutil.rmtree(finished / "evaluation")
    output = Path(config_of(finished).output)
    command = overrides(tiny_lm, tiny_text, output, *KINDS["ordinary"])
    assert run(command) == (0, finished)
    assert not (finished / "evaluation").exists()
    capsys.readouterr()
    assert run([*command, "evaluate=true"]) == (0, finished)
    printed = capsys.readouterr().out
    assert "finished before" in printed
    assert "1,024 held-out tokens" in printed
    assert comparable(read(finished)) == before
    assert {p: p.stat().st_mtime_ns for p in finished.glob("saes/*/sae.safetensors")} == kept


def test_less_held_out_text_than_the_default_asks_for_is_taken_as_it_is(copy: Path) -> None:
    set_option(copy, "stream.heldout_tokens", 10_000_000)
    evaluation = evaluate(copy)
    assert evaluation["tokens"] == evaluation["sequences"] * 64
    assert 1024 < evaluation["tokens"] < 10_000_000


def test_a_part_writes_prints_and_reports_what_it_found(copy: Path, capsys: Any) -> None:
    pytest.importorskip("sklearn")
    rows = [{"text": f"f{n} {end}", "label": end} for n in range(20) for end in ("(", "self")]
    (copy / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    few = ["evaluation.probes.k=[1,5]", "evaluation.probes.bootstrap.resamples=20", "logger=none"]
    with pytest.raises(UserError, match="labels=nowhere.csv: there is no such file"):
        evaluate(copy, "evaluation=probes", *few, "evaluation.probes.labels=nowhere.csv")
    capsys.readouterr()
    evaluate(copy, "evaluation=probes", *few, f"evaluation.probes.labels={copy}/labels.jsonl")
    found = json.loads((copy / "evaluation" / "probes.json").read_text())
    assert [row["grouping"] for row in found["groupings"]] == ["complete-2"]
    table = (copy / "evaluation" / "probes_probes.csv").read_text().splitlines()
    assert len(table) == 1 + len(found["probes"])
    assert "Probes on k latents" in " ".join(capsys.readouterr().out.split())
    write_report([copy])
    assert "Probes on k latents" in (copy / "report" / "report.html").read_text()


def test_benchmarks_are_printed_and_reported_with_the_gate(copy: Path, capsys: Any) -> None:
    pytest.importorskip("lm_eval")
    few = ["tasks=arithmetic", "limit=3", "layers=false", "bootstrap.resamples=20"]
    evaluate(copy, "evaluation=harness", "logger=csv", *(f"evaluation.harness.{x}" for x in few))
    assert "The unchanged model on each task" in " ".join(capsys.readouterr().out.split())
    found = json.loads((copy / "evaluation" / "harness.json").read_text())
    assert len(found["tasks"]) == 6
    able = [row for row in found["tasks"] if row["interpreted"]]
    assert len(found["compared"]) == len(able)
    logged = {name for _, name, _ in read_metrics(copy / "metrics.csv")}
    for row in able:
        name = f"lost_together_{row['task']}_{row['metric']}"
        assert f"eval/harness/{name}/complete-2" in logged
    write_report([copy])
    page = (copy / "report" / "report.html").read_text()
    assert ("no: not above chance" in page) == (len(able) < 6)


# ---- W&B --------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Take away whatever account this machine has, and what W&B leaves in the process."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_SILENT", "WANDB_BASE_URL"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for kind in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{kind}_DIR", str(tmp_path / kind))
    yield
    wandb.finish()
    wandb.teardown()


def history(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert files
    return [
        values(record.history.item)
        for file in files
        for record in recorded(file)
        if record.HasField("history")
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb")
@pytest.mark.usefixtures("offline")
def test_wandb_gets_the_metrics_and_the_figures(copy: Path) -> None:
    evaluation = evaluate(copy, "logger=wandb")
    wandb.finish()
    rows = history(copy)
    (logged,) = (row for row in rows if "eval/fvu/complete-2" in row)
    steps = json.loads((copy / "summary.json").read_text())["steps"]
    assert logged["trainer/global_step"] == steps + 1
    assert logged["eval/kl/complete-2"] == evaluation["groupings"][0]["all_layers"]["kl"]["value"]
    assert {f"eval/delta_ce/layer.{x}" for x in range(4)} < set(logged)
    (figures,) = (row for row in rows if "figures/filenames" in row)
    assert {"fvu_layers", "delta_ce_layers", "profiles", "density"} <= set(
        figures["figures/captions"]
    )
    media = next(copy.glob("wandb/offline-run-*/files"))
    for name in figures["figures/filenames"]:
        assert (media / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb")
@pytest.mark.usefixtures("offline")
def test_wandb_gets_training_and_evaluation_in_one_run(
    tiny_lm: Path, tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = overrides(tiny_lm, tiny_text, tmp_path, *KINDS["ordinary"], "logger=wandb")
    _, folder = run([*command, "evaluate=true"])
    assert f"later: wandb sync {folder}/wandb/offline-*" in capsys.readouterr().out
    assert wandb.run is None  # closed: the next point of a sweep is another run
    rows = history(folder)
    assert any("train/fvu/layers.0" in row for row in rows)
    assert any("eval/fvu/complete-2" in row for row in rows)
    assert len(list(folder.glob("wandb/offline-run-*"))) == 1
    shutil.rmtree(folder / "evaluation")
    run([*command, "evaluate=true"])  # finished: evaluated only
    assert wandb.run is None


# ---- what is refused --------------------------------------------------------------------------


def times(run_folder: Path) -> dict[Path, int]:
    """Return when each file was written, but for the lock that every command takes."""
    own = ("lock", ".hydra")
    return {p: p.stat().st_mtime_ns for p in run_folder.rglob("*") if p.name not in own}


def refused(run_folder: Path, *arguments: str) -> str:
    """Return the sentence; nothing may have been written."""
    before = times(run_folder)
    with pytest.raises(UserError) as stopped:
        evaluate(run_folder, *arguments)
    assert times(run_folder) == before
    return " ".join(str(stopped.value).split())


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("evaluation.tokens=10000000", "10,000,000 is more than the 14,336 tokens that the"),
        ("evaluation.tokens=100", "is less than one step of 512 tokens: ask for at least 512."),
        ("evaluation.tokens=0", "evaluation.tokens is 0; it must be an integer of at least 1"),
        ("evaluation.tokens=lots", "evaluation.tokens is 'lots'; it must be an integer"),
        ("evaluation.tokens=999.5", "evaluation.tokens is 999.5; it must be an integer"),
        ("device=gpu", "device is 'gpu'; use auto, cpu, cuda or cuda:<index>."),
        ("device=mps", "device is 'mps'; use auto, cpu, cuda or cuda:<index>."),
        ("device=null", "device is None; use auto"),
        ("device=0", "device is 0; use auto"),
        ("device=cuda:99", "device is cuda:99, but"),
        ("evaluation.bootstrap.resamples=0", "bootstrap.resamples is 0; it must be an integer"),
        ("evaluation.bootstrap.resamples=many", "resamples is 'many'; it must be an integer"),
        ("evaluation.bootstrap.level=95", "level is 95; it must be a number between 0 and 1"),
        (
            "evaluation.bootstrap.level=high",
            "level is 'high'; it must be a number between 0 and 1",
        ),
        ("evaluation.bootstrap.seed=-1", "seed is -1; it must be an integer of at least 0."),
        ("evaluation.bootstrap=null", "bootstrap.resamples is None; it must be"),
        ("evaluation.similarity_tokens=-1", "similarity_tokens is -1; it must be an integer"),
        ("evaluation.together=maybe", "evaluation.together is 'maybe'; it must be true or false."),
        ("evaluation.exclude_special_tokens=some", "is 'some'; it must be true or false, or null"),
        ("run=null", "which run? Give run=<folder>"),
    ],
)
def test_bad_options_are_named_with_what_is_allowed(
    argument: str, sentence: str, folder: Folder
) -> None:
    assert sentence in refused(folder("ordinary"), argument)


def test_a_folder_that_is_no_finished_run_is_named(copy: Path, tmp_path: Path) -> None:
    for wrong in (tmp_path / "nowhere", tmp_path):
        sentence = refused(wrong)
        assert f"run={wrong}: no run there" in sentence
        assert "Name a run folder such as" in sentence
    (copy / "groups.json").rename(copy / "gone.json")
    assert "has no groups.json: it is not a run folder" in refused(copy)
    (copy / "gone.json").rename(copy / "groups.json")
    ledger = (copy / "ledger.json").read_text()
    (copy / "ledger.json").write_text("{")
    assert "ledger.json is damaged" in refused(copy)
    (copy / "ledger.json").unlink()
    assert "ledger.json is missing: restore it" in refused(copy)
    (copy / "ledger.json").write_text(ledger)
    sae = copy / "saes" / "layers.0" / "sae.safetensors"
    sae.write_bytes(sae.read_bytes()[:100])
    assert "saes/layers.0 is damaged" in refused(copy)
    shutil.rmtree(copy / "saes")
    assert "saes/layers.0 is damaged" in refused(copy)
    (copy / "summary.json").unlink()
    sentence = refused(copy)
    assert "has no SAEs yet: it was not finished" in sentence
    assert f"python -m groupsae.train resume={copy}" in sentence


def test_other_weights_are_refused(copy: Path, tiny_lm: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(tiny_lm, tmp_path / "lm"))
    set_option(copy, "model.name", str(changed))
    evaluate(copy)  # the same weights elsewhere are the same model
    weights = load_file(changed / "model.safetensors")
    name = next(iter(weights))
    save_file(
        {**weights, name: weights[name] + 1}, changed / "model.safetensors", {"format": "pt"}
    )
    sentence = refused(copy)
    assert f"the SAEs in {copy} were trained on other weights of {tiny_lm}" in sentence
    assert sentence.endswith("restore them, or train on these in another output=<folder>.")


def test_other_text_is_refused(copy: Path, tiny_text: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(tiny_text, tmp_path / "text"))
    (changed / "007.txt").write_text("def other(a, b):\n    return a\n" * 60)
    set_option(copy, "data.path", str(changed))
    sentence = refused(copy)
    assert "were trained on packed text" in sentence
    assert sentence.endswith("Restore the old text, or train on this in another output=<folder>.")


def test_the_command_line_asks_which_run() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "groupsae.evaluate"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: which run? Give run=<folder>, such as")
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run=a,a"], "this command takes one at a time: give run=a, each"),
        (["run=a,b c"], "give run=a and 'run=b c', each in a separate command."),
        (["run=it's/k=1 (b)"], "run=it's/k=1 (b): no run there"),
        (["run=a", "groups=all"], "groups is unknown."),
        (["run=a", "evaluation.tokns=5"], "Did you mean evaluation.tokens?"),
    ],
)
def test_the_command_line_takes_one_folder_of_any_name(
    arguments: list[str], sentence: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "groupsae.evaluate", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_command_to_copy_is_quoted_for_the_shell(copy: Path, tmp_path: Path) -> None:
    odd = copy.rename(tmp_path / "a run")
    (odd / "summary.json").unlink()
    assert f"python -m groupsae.train 'resume={odd}'" in refused(odd)


@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_the_help_names_the_command_and_no_options_of_others(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"groupsae.{command}", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"python -m groupsae.{command} run=<run folder>" in done.stdout
    assert "__main__" not in done.stdout
    assert "pythia" not in done.stdout


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ("evaluation.bootstrap.level=95", r"evaluation\.bootstrap\.level is 95"),
        ("evaluation.tokens=10000000", "10,000,000 is more than the 14,336 tokens"),
    ],
)
def test_a_wrong_option_of_the_evaluation_costs_no_training(
    wrong: str, sentence: str, tiny_lm: Path, tiny_text: Path, tmp_path: Path
) -> None:
    command = overrides(tiny_lm, tiny_text, tmp_path, *KINDS["ordinary"], "evaluate=true")
    with pytest.raises(UserError, match=sentence):
        run([*command, wrong])
    assert not list(tmp_path.rglob("angles.npz"))  # not even the layers were measured


def test_a_refused_command_leaves_no_record_behind(
    tiny_lm: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That there is too little held-out text is seen once it is packed."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    wrong, refused = "evaluation.tokens=10000000", "10,000,000 is more than"
    assert left_of(tiny_lm, tiny_text, tmp_path, wrong, refused) == {"cache"}


def test_a_wrong_option_of_a_logger_is_refused_before_any_work(
    tiny_lm: Path, tiny_text: Path, tmp_path: Path
) -> None:
    assert not left_of(tiny_lm, tiny_text, tmp_path, "+logger.wandb.nope=1", "nope")


def left_of(lm: Path, text: Path, output: Path, wrong: str, refused: str) -> set[str]:
    """Return the first folders of the files that a refused command has left."""
    from groupsae.train import train

    command = overrides(lm, text, output, *KINDS["ordinary"], "evaluate=true", "logger=wandb")
    with pytest.raises(UserError, match=refused):
        train(composed([*command, wrong]), [*command, wrong])
    assert wandb.run is None
    files = [path.relative_to(output) for path in output.rglob("*") if path.is_file()]
    return {file.parts[0] for file in files}


def test_ctrl_c_ends_an_evaluation_with_a_sentence(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from groupsae.evaluate import main
    from groupsae.evaluation import text

    monkeypatch.setattr(text, "begin_evaluation", lambda _: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(sys, "argv", ["evaluate", f"run={copy}", "device=cpu"])
    # jobs in the background of a shell ignore Ctrl-C
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == 128 + signal.SIGINT
    assert "the same command begins the evaluation again" in capsys.readouterr().err


def test_sigterm_ends_an_evaluation_at_once(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training gives the signals back when it ends."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    folder("ordinary")
    assert {n: signal.getsignal(n) for n in before} == before


def test_a_run_of_an_older_version_is_refused_before_the_work(copy: Path) -> None:
    file = copy / "ledger.json"
    old = {k: v for k, v in json.loads(file.read_text()).items() if k != "format"}
    file.write_text(json.dumps(old))
    assert "ledger.json has format None, this version of groupsae reads 2" in refused(copy)


def test_damaged_files_of_a_run_are_named(copy: Path) -> None:
    for name in ("groups.json", ".hydra/config.yaml"):
        whole = (copy / name).read_text()
        (copy / name).write_text(whole[: len(whole) // 2] + "{[")
        assert f"{copy / name} is damaged" in refused(copy)
        (copy / name).write_text(whole)


def test_a_folder_that_cannot_be_written_is_reported_before_the_work(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", fail)
    with pytest.raises(UserError, match="cannot write"):
        evaluate(copy)

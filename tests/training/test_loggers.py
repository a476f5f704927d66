"""metrics.csv across a resume, and what the real wandb package records without an account."""

import json
import os
import warnings

import pytest
import wandb

from groupsae.config.instantiate import make as make_object
from groupsae.config.security import check_own
from groupsae.files.reading import read_metrics
from groupsae.training.loggers import MetricsCSV, has_wandb_account, make_wandb
from tests.helpers.runs import composed
from tests.helpers.wandb_files import recorded, values


def log(folder, *rows):
    logger = MetricsCSV(folder=str(folder))
    for step, metrics in rows:
        logger.log_metrics(metrics, step=step)


def test_metrics_are_read_back_as_they_were_logged(tmp_path):
    log(tmp_path / "run", (9, {"train/fvu/a": 0.1234567890123, "epoch": 0.0}), (19, {"x": 1e-12}))
    path = tmp_path / "run" / "metrics.csv"
    assert read_metrics(path) == [(9, "train/fvu/a", 0.1234567890123), (19, "x", 1e-12)]
    assert path.read_text().splitlines()[0] == "step,metric,value"


def test_a_resumed_run_appends_and_repeats_no_step(tmp_path):
    log(tmp_path, (9, {"a": 1.0}), (19, {"a": 2.0}), (29, {"a": 3.0, "b": 3.5}))
    log(tmp_path, (19, {"a": 2.5}), (29, {"a": 3.0}))  # went on from a checkpoint at step 10
    expected = [(9, "a", 1.0), (19, "a", 2.5), (29, "a", 3.0)]
    assert read_metrics(tmp_path / "metrics.csv") == expected


def test_commands_on_a_finished_run_replace_their_own_rows_only(tmp_path):
    log(tmp_path, (9, {"train/a": 1.0}))
    for value in (1.0, 2.0):
        log(tmp_path, (11, {"eval/a": value}))
        log(tmp_path, (11, {"interpret/a": value}))
    expected = [(9, "train/a", 1.0), (11, "eval/a", 2.0), (11, "interpret/a", 2.0)]
    assert read_metrics(tmp_path / "metrics.csv") == expected
    log(tmp_path, (9, {"train/a": 3.0}))  # training from a checkpoint: what came after is void
    assert read_metrics(tmp_path / "metrics.csv") == [(9, "train/a", 3.0)]


def test_a_new_metric_in_the_middle_of_a_run_is_just_another_row(tmp_path):
    log(tmp_path, (0, {"a": 1.0}), (0, {"late": 2.0}), (1, {"a": 3.0}))
    assert [name for _, name, _ in read_metrics(tmp_path / "metrics.csv")] == ["a", "late", "a"]


@pytest.mark.parametrize("rest", ["29", "29,a", "29,a,", "29,a,1e-"])
def test_a_last_row_truncated_by_a_kill_does_not_stop_a_resume(tmp_path, rest):
    log(tmp_path, (9, {"a": 1.0}))
    with (tmp_path / "metrics.csv").open("a") as handle:
        handle.write(rest)
    log(tmp_path, (19, {"a": 2.0}))
    assert read_metrics(tmp_path / "metrics.csv") == [(9, "a", 1.0), (19, "a", 2.0)]


def test_a_missing_file_has_no_rows(tmp_path):
    assert read_metrics(tmp_path / "metrics.csv") == []


# ---- Weights & Biases -----------------------------------------------------------------------


@pytest.fixture
def no_account(monkeypatch, tmp_path):
    """Take away whatever account this machine has; put the environment back afterwards."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_SILENT", "WANDB_BASE_URL"):
        monkeypatch.setenv(name, "")  # so that it is restored even if the code sets it again
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for kind in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{kind}_DIR", str(tmp_path / kind))
    return tmp_path


def test_an_account_is_an_api_key_or_an_entry_in_netrc(no_account, monkeypatch):
    assert not has_wandb_account()
    netrc = no_account / "netrc"
    netrc.write_text("machine elsewhere.org login me password secret\n")
    assert not has_wandb_account()
    netrc.write_text("machine api.wandb.ai login user password 0123\n")
    assert has_wandb_account()
    netrc.write_text("this is no netrc")
    assert not has_wandb_account()
    monkeypatch.setenv("WANDB_API_KEY", "0123")
    assert has_wandb_account()


def test_an_account_of_another_host_is_found_by_its_base_url(no_account, monkeypatch):
    (no_account / "netrc").write_text("machine wandb.corp login user password 0123\n")
    assert not has_wandb_account()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.corp/api")
    assert has_wandb_account()


def make(folder):
    return make_wandb(project="groupsae-test", folder=str(folder), tags=["a tag"])


@pytest.mark.parametrize(("mode", "account", "offline"), [
    (None, False, True), (None, True, False), ("offline", True, True), ("online", False, False),
])  # fmt: skip
def test_the_mode_is_online_only_with_an_account_unless_the_user_sets_it(
    no_account, monkeypatch, mode, account, offline
):
    if account:
        monkeypatch.setenv("WANDB_API_KEY", "0123")
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    assert make(no_account / "run")._offline is offline


def test_a_key_that_does_not_work_means_offline_and_not_a_crash(no_account, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123")
    wandb.teardown()  # it remembers the mode of what the process recorded before
    logger = make(no_account / "run")
    with pytest.warns(UserWarning, match="recorded offline"):
        run = logger.experiment
    assert run.offline
    wandb.finish()
    wandb.teardown()  # it remembers the key for the rest of the process


def test_nothing_is_begun_before_it_is_used(no_account):
    make(no_account / "run")
    assert wandb.run is None
    assert not (no_account / "run").exists()


def test_a_resumed_run_keeps_the_name_of_its_folder(no_account):
    first, again = (make(no_account / "amad-0.2" / "1M-k16") for _ in range(2))
    assert first.version == again.version
    assert first._name == "amad-0.2-1M-k16"
    assert make(no_account / "amad-0.2" / "1M-k32").version != first.version


def test_the_variables_of_wandb_win_over_our_defaults(no_account, monkeypatch):
    for name, value in {
        "PROJECT": "theirs", "NAME": "a name", "RUN_ID": "an-id", "TAGS": "x,y", "DIR": "here",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"WANDB_{name}", value)
    cfg = composed(["logger=wandb", f"output={no_account}"])
    logger = make_object(cfg.logger.wandb)
    assert (logger._name, logger.version, logger.save_dir) == ("a name", "an-id", "here")
    assert logger._wandb_init["project"] == "theirs"
    assert logger._wandb_init["tags"] is None  # so W&B takes WANDB_TAGS
    check_own(cfg)
    assert cfg.logger.wandb.project == "theirs"  # in the run folder: what was used
    explicit = composed(["logger=wandb", "logger.wandb.project=ours", "logger.wandb.tags=[a]"])
    logger = make_object(explicit.logger.wandb)
    assert logger._wandb_init["project"] == "ours"
    assert logger._wandb_init["tags"] == ["a"]
    monkeypatch.delenv("WANDB_PROJECT")
    assert composed(["logger=wandb"]).logger.wandb.project == "groupsae"


@pytest.mark.slow
def test_wandb_without_account_records_metrics_image_and_table_offline(no_account, capsys):
    import wandb
    from matplotlib.figure import Figure

    folder = no_account / "amad-0.2" / "run"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="wandb")
        logger = make(folder)
        logger.log_hyperparams({"tokens": 1000, "sae": {"k": 16}})
        logger.log_metrics({"train/fvu/layers.0": 0.5}, step=10)
        logger.log_metrics({"train/fvu/layers.0": 0.25, "groups/amad": 0.125}, step=20)
        figure = Figure()
        figure.add_subplot().plot([0, 1])
        figure.savefig(folder / "amad.png")
        logger.log_image("figures", [str(folder / "amad.png")], caption=["amad"])
        logger.log_table("groups", columns=["group", "layers"], data=[["layers.0-1", "[0, 1]"]])
        wandb.finish()
        wandb.teardown()
    files = list(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 1
    records = recorded(files[0])

    run = next(r.run for r in records if r.HasField("run"))
    assert (run.project, run.run_id, list(run.tags)) == (
        "groupsae-test",
        "amad-0.2-run",
        ["a tag"],
    )
    config = values(u for r in records if r.HasField("run") for u in r.run.config.update)
    config |= values(u for r in records if r.HasField("config") for u in r.config.update)
    assert config["tokens"] == 1000
    assert config["sae"] == {"k": 16}

    history = [values(r.history.item) for r in records if r.HasField("history")]
    logged = [(row["trainer/global_step"], row["train/fvu/layers.0"]) for row in history
              if "train/fvu/layers.0" in row]  # fmt: skip
    assert logged == [(10, 0.5), (20, 0.25)]
    assert any(row.get("groups/amad") == 0.125 for row in history)

    media = files[0].parent / "files"
    image = next(row for row in history if "figures/filenames" in row)
    assert image["figures/captions"] == ["amad"]
    assert (media / image["figures/filenames"][0]).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    table = next(row for row in history if "groups/path" in row)
    content = json.loads((media / table["groups/path"]).read_text())
    assert content["columns"] == ["group", "layers"]
    assert content["data"] == [["layers.0-1", "[0, 1]"]]
    printed = capsys.readouterr()
    assert "api_key" not in printed.out + printed.err  # nobody was asked to log in
    assert "Enter your choice" not in printed.out + printed.err


def test_wandb_switched_off_by_the_user_stays_off(no_account, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    logger = make(no_account / "run")
    assert logger._offline is False  # Lightning would turn an offline logger's mode into "dryrun"
    assert os.environ["WANDB_MODE"] == "disabled"

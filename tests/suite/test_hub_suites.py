"""Suites on the Hub: huggingface_hub itself, against a stand-in for the Hub on this machine."""

import json

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir

import groupsae
from groupsae.app.import_saes import download_saes, import_saes
from groupsae.app.run_folder import register_resolver
from groupsae.config.instantiate import CONF
from groupsae.export import export as command
from groupsae.files.atomic import write_json
from groupsae.runtime.errors import UserError
from groupsae.suite.hub import Repository, looks_like_name, repository
from groupsae.suite.importing import ReadAt, read_folder
from groupsae.suite.suite import Suite
from tests.helpers.hub_stand_in import READER, WRITER, ask, serving
from tests.helpers.shelf import rows, run_folder

# of the library that carries huggingface_hub's uploads
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serving() as running:
        ask(running, monkeypatch, tmp_path)
        yield running


@pytest.fixture
def run(tmp_path):
    folder = run_folder(tmp_path / "run", "topk")
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "config.yaml").write_text("data: {name: NeelNanda/pile}\n")
    (folder / "figures").mkdir()
    (folder / "figures" / "amad.png").write_bytes(b"a picture")
    (folder / "evaluation").mkdir()
    fvu = {"value": 0.25, "low": 0.2, "high": 0.3}
    row = {"sae": "layers.3", "layer": 3, "fvu": fvu, "l0": 5.0, "delta_ce": None}
    other = {**row, "sae": "layers.2-3"}  # of another grouping
    note = f"see {folder}/notes, {folder}/x and 1/2 of https://huggingface.co/a/b"
    evaluation = {"run": str(folder), "tokens": 1024, "note": note, "results": [row, other]}
    (folder / "evaluation" / "results.csv").write_text(f"run,fvu\n{folder},0.25\n")
    write_json(folder / "evaluation" / "evaluation.json", evaluation)
    groups = {"layers.3": {"fvu": 0.125, "l0": 5.0}}
    summary = {"folder": str(folder), "groups": groups, "amad": 0.1875}
    write_json(folder / "summary.json", summary)
    return folder


def export(run, *arguments):
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        command(compose("export", [f"run={run}", *arguments]))


def front(hub, repo):
    """Return front matter and text of a repository's page."""
    text = hub.files(repo, "main")[1]["README.md"].decode()
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_a_run_goes_to_the_hub_and_is_loaded_from_there(hub, run, capsys):
    export(run, "hub=me/saes")
    _, files = hub.files("me/saes", "main")
    assert sorted(files) == [
        ".gitattributes", "README.md", "evaluation/evaluation.json",
        "evaluation/results.csv", "figures/amad.png",
        "saes/layers.0-1/cfg.json", "saes/layers.0-1/sae.safetensors",
        "saes/layers.3/cfg.json", "saes/layers.3/sae.safetensors", "summary.json",
    ]  # fmt: skip
    assert "me/saes" in hub.private
    message = capsys.readouterr().out
    assert f"Uploaded 9 files: {hub.url}/me/saes" in message
    assert WRITER not in message
    assert not any(str(run.parent).encode() in content for content in files.values())
    assert (
        b"see notes, x and 1/2 of https://huggingface.co/a/b"
        in (files["evaluation/evaluation.json"])
    )
    here, there, x = groupsae.load_suite(run), groupsae.load_suite("hf:me/saes"), rows()
    assert there.layers == here.layers
    for layer in here.layers:
        assert torch.equal(there.encode(x, layer), here.encode(x, layer))
    got = [call for call in hub.calls if call.startswith("GET") and "/resolve/" in call]
    results = ("summary.json", "evaluation.json")  # of what repr(suite) shows
    assert all("/saes/" in call or call.endswith(results) for call in got)  # and no figures


def test_the_page_names_model_data_groups_metrics_figures_and_use(hub, run):
    export(run, "hub=me/saes")
    head, body = front(hub, "me/saes")
    assert head["library_name"] == "groupsae"
    assert {"sparse-autoencoder", "group-sae"} <= set(head["tags"])
    assert head["base_model"] == "EleutherAI/pythia-14m"
    assert head["datasets"] == ["NeelNanda/pile"]
    assert "| layers.0-1 | 0-1 | topk, k = 5 | 48 | 1,000 | - | - |" in body
    assert "| layers.3 | 3 | topk, k = 5 | 48 | 1,000 | 0.1250 | 5.0 |" in body
    assert "| 3 | layers.3 | 0.2500 | 5.0 | - | - |" in body
    assert "layers.2-3" not in body
    assert "AMAD 0.1875" in body
    assert "![amad](figures/amad.png)" in body
    assert 'groupsae.Suite.from_pretrained("me/saes")' in body
    assert "step1000" in body


def test_which_files_of_a_repository_an_upload_may_have_left():
    from groupsae.suite.card import is_upload

    ours = ["decoder.layers.1.fc2/cfg.json", "h.1/sae.safetensors", "mlp_out_layer_3/ae.pt",
            "blocks.1.hook_mlp_out/cfg.json", "saes/layers.3/cfg.json", "groups.json"]  # fmt: skip
    theirs = ["config.json", "cfg.json", "model/config.json", "x/layers.1/cfg.json", "README.md",
              "layers.1/notes.md", "evaluation/thesis.pdf"]  # fmt: skip
    assert [path for path in ours + theirs if is_upload(path)] == ours


def test_the_page_of_one_grouping_loads_that_grouping(run):
    from groupsae.suite.card import card

    page = card(
        "me/x", run, groupsae.load_suite(run), grouping="complete-3", library=None, folders=[]
    )
    assert 'from_pretrained("me/x", grouping="complete-3")' in page
    assert "# acts: resid_post of block 0" in page


def test_a_model_in_a_folder_is_no_base_model(hub, tmp_path):
    run = run_folder(tmp_path / "run", "topk", model=str(tmp_path / "secret" / "my-model"))
    export(run, "hub=me/saes")
    head, body = front(hub, "me/saes")
    assert "base_model" not in head
    assert "my-model" in body
    _, files = hub.files("me/saes", "main")
    assert not any(b"secret" in content for content in files.values())


@pytest.mark.parametrize("form", ["saelens", "sparsify", "dictionary_learning"])
def test_exported_folders_go_to_the_hub_and_come_back_by_import(hub, run, form):
    export(run, f"format={form}", "hub=me/saes", "private=false")
    head, body = front(hub, "me/saes")
    assert head["library_name"] == form
    assert {"saelens": "from sae_lens", "sparsify": "from sparsify"}.get(form, form) in body
    assert "me/saes" not in hub.private
    folder = download_saes(Repository("me/saes", None), None)
    found = read_folder(folder, ReadAt(6, 16, "resid_post", "decoder"))
    assert [each.layers for each in found] == [[0], [1], [3]]
    some = download_saes(Repository("me/saes", None), ["*3*"])
    assert some == folder  # one snapshot


def test_only_the_chosen_folders_are_fetched_from_the_hub(hub, run, tiny_lm, tmp_path):
    export(run, "format=sparsify", "hub=me/saes")
    register_resolver()
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        model = ["model=hf", f"model.name={tiny_lm}", f"output={tmp_path}"]
        cfg = compose("import_saes", ["saes=hf:me/saes", "only=[layers.3]", *model])
    with pytest.raises(UserError, match=r"layers\.3 has d_model 16"):
        import_saes(cfg)
    got = [call for call in hub.calls if call.startswith("GET") and "/resolve/" in call]
    assert {call.rsplit("/", 2)[1] for call in got} == {"layers.3"}
    assert not (tmp_path / tiny_lm.name).exists()


def test_a_revision_is_the_one_that_is_loaded(hub, run):
    export(run, "hub=me/saes")
    hub.tags["v1"] = hub.files("me/saes", "main")[0]
    before = groupsae.load_suite("hf:me/saes@v1").encode(rows(), 3)
    other = run_folder(run.parent / "other", "relu")
    with pytest.raises(
        UserError, match="already contains 9 files, such as README.md: overwrite=true"
    ):
        export(other, "hub=me/saes")
    export(other, "hub=me/saes", "overwrite=true")
    assert not torch.equal(groupsae.load_suite("hf:me/saes").encode(rows(), 3), before)
    assert torch.equal(groupsae.load_suite("hf:me/saes@v1").encode(rows(), 3), before)
    with pytest.raises(UserError, match=r"refused hf:me/saes@v9 \(status 404, Rev"):
        groupsae.load_suite("hf:me/saes@v9")


def test_a_second_upload_leaves_none_of_the_old_saes_and_what_others_put_there(hub, run):
    export(run, "hub=me/saes")
    hub.commit(
        "me/saes", hub.files("me/saes", "main")[1] | {"notes.md": b"mine", "a/cfg.json": b""}
    )
    export(run, "hub=me/saes", "format=sparsify", "overwrite=true")
    theirs = [".gitattributes", "README.md", "a/cfg.json"]
    saes = [f"layers.{x}/{name}" for x in (0, 1, 3) for name in ("cfg.json", "sae.safetensors")]
    figures = ["figures/amad.png"]
    assert sorted(hub.files("me/saes", "main")[1]) == [*theirs, *figures, *saes, "notes.md"]
    assert "(figures/amad.png)" in front(hub, "me/saes")[1]
    export(run, "hub=me/saes", "format=saelens", "overwrite=true")
    files = sorted(hub.files("me/saes", "main")[1])
    assert [file for file in files if "blocks." not in file] == [*theirs, *figures, "notes.md"]
    with pytest.raises(
        UserError, match="already contains 10 files.*The folders are in .*overwrite=true"
    ):
        export(run, "hub=me/saes", "format=dictionary_learning")


def test_a_run_on_the_hub_is_exported_from_there(hub, run, tmp_path):
    export(run, "hub=me/saes")
    export("hf:me/saes", "format=saelens", f"output={tmp_path / 'out'}")
    assert (tmp_path / "out" / "blocks.3.hook_resid_post" / "cfg.json").exists()
    with pytest.raises(UserError, match="name one to write to, output="):
        export("hf:me/saes", "format=saelens")
    with pytest.raises(UserError, match="is on the Hub already"):
        export("hf:me/saes", "hub=me/other")


def test_a_suite_is_pushed_from_a_notebook_as_the_command_exports_it(hub, run):
    export(run, "hub=me/exported")
    suite = Suite.from_pretrained(run)
    assert suite.push_to_hub("me/pushed", private=False) == f"{hub.url}/me/pushed"
    exported, pushed = (hub.files(f"me/{name}", "main")[1] for name in ("exported", "pushed"))
    assert sorted(pushed) == sorted(exported)
    page, cfg = "README.md", "saes/layers.3/cfg.json"
    assert json.loads(pushed[cfg]) == json.loads(exported[cfg])
    assert pushed[page] == exported[page].replace(b"exported", b"pushed")
    others = sorted(pushed.keys() - {page, cfg, "saes/layers.0-1/cfg.json"})
    assert [pushed[name] for name in others] == [exported[name] for name in others]
    assert hub.private == {"me/exported"}
    with pytest.raises(UserError, match="already contains 9 files"):
        suite.push_to_hub("me/pushed")
    suite.push_to_hub("hf:me/pushed", overwrite=True)


def test_what_is_pushed_is_the_suite_in_memory(hub, run):
    suite = Suite.from_pretrained(run)
    suite[3].W_dec[7] = 0.0
    suite.push_to_hub("me/edited", commit_message="without latent 7")
    assert not Suite.from_pretrained("me/edited")[3].W_dec[7].any()
    assert Suite.from_pretrained(run)[3].W_dec[7].any()


def test_a_branch_is_made_and_loaded(hub, run):
    suite = Suite.from_pretrained(run)
    suite.push_to_hub("me/saes")
    suite[3].W_dec[7] = 0.0
    suite.push_to_hub("me/saes", revision="edited", overwrite=True)
    assert Suite.from_pretrained("me/saes")[3].W_dec[7].any()
    for there in (
        Suite.from_pretrained("me/saes@edited"),
        Suite.from_pretrained("hf:me/saes", revision="edited"),
    ):
        assert not there[3].W_dec[7].any()
    with pytest.raises(UserError, match="names a revision already: leave out revision=x"):
        Suite.from_pretrained("me/saes@edited", revision="x")


def test_a_local_folder_wins_over_a_repository_of_the_same_name(hub, run, tmp_path, monkeypatch):
    Suite.from_pretrained(run).push_to_hub("me/saes")
    monkeypatch.chdir(tmp_path)
    assert Suite.from_pretrained("me/saes").run != tmp_path / "me" / "saes"
    run_folder(tmp_path / "me" / "saes", "relu")
    assert "relu" in repr(Suite.from_pretrained("me/saes"))
    assert "topk" in repr(Suite.from_pretrained("hf:me/saes"))
    with pytest.raises(UserError, match="no repository of the Hub: leave out revision=v1"):
        Suite.from_pretrained("me/saes", revision="v1")
    with pytest.raises(UserError, match="there is no folder me/none here, and the Hub refused"):
        Suite.from_pretrained("me/none")


def test_a_suite_of_the_hub_shows_the_results_of_its_run(hub, run):
    Suite.from_pretrained(run).push_to_hub("me/saes")
    assert repr(Suite.from_pretrained("me/saes")) == repr(Suite.from_pretrained(run))


def test_what_the_hub_refuses_is_one_sentence(hub, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", READER)
    with pytest.raises(UserError, match=r"refused hf:me/saes \(status 403") as refused:
        export(run, "hub=me/saes")
    assert READER not in str(refused.value)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match="status 401"):
        export(run, "hub=me/saes")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="no token to write hf:me/saes: log in with"):
        export(run, "hub=me/saes")
    with pytest.raises(UserError, match="refused hf:me/none .*hf auth login"):
        groupsae.load_suite("hf:me/none")
    with pytest.raises(UserError, match="write owner/name"):
        groupsae.load_suite("hf:none")
    assert hub.repos == {}


def test_without_network_the_cache_is_used_or_the_error_says_so(hub, run, monkeypatch):
    from huggingface_hub import constants

    export(run, "hub=me/saes")
    groupsae.load_suite("hf:me/saes")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    assert groupsae.load_suite("hf:me/saes").layers == [0, 1, 3]
    with pytest.raises(UserError, match="the Hub cannot be reached for hf:me/others"):
        groupsae.load_suite("hf:me/others")
    with pytest.raises(UserError, match="the Hub cannot be reached for hf:me/saes"):
        export(run, "hub=me/saes")


def test_a_repository_without_saes_says_so(hub):
    hub.repos["me/empty"] = []
    hub.commit("me/empty", {"README.md": b"nothing"})
    with pytest.raises(UserError, match="no SAEs under hf:me/empty"):
        groupsae.load_suite("hf:me/empty")


def test_which_texts_are_names_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert repository("outputs/run") is None
    assert repository("hf:a/b@c/d") == Repository("a/b", "c/d")
    assert looks_like_name("EleutherAI/sae-pythia-160m")
    assert not looks_like_name("./here/there")
    assert not looks_like_name("/here/there")
    assert not looks_like_name("a/b/c")
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert not looks_like_name("a/b")
    assert json.dumps(Repository("a/b", None)) == '["a/b", null]'

"""A configuration is data, perhaps a stranger's: no code runs, no secret leaves."""

import ast
import os
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from groupsae.app.run_folder import finished_run, open_run, save_config
from groupsae.config.instantiate import allowed, check_targets, make
from groupsae.config.security import check_own
from groupsae.lm.options import check_load_options
from groupsae.runtime.errors import UserError
from groupsae.runtime.secrets import redacted, secret_in
from tests.helpers import runs

ROOT = Path(__file__).parents[2]
SOURCES = [*(ROOT / "groupsae").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
# load anything, or run what they are given
FORBIDDEN = {
    "pickle.load", "pickle.loads", "dill.load", "joblib.load", "cloudpickle.load",
    "marshal.loads", "shelve.open", "yaml.load", "yaml.unsafe_load", "os.system", "eval", "exec",
    "torch.hub.load", "torch.jit.load", "pd.read_pickle", "instantiate", "hydra.utils.instantiate",
}  # fmt: skip
SECRET = "hf_PlantedSecretThatNobodyMaySee1"


def calls(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            yield ast.unparse(node.func), given, f"{path.name}:{node.lineno}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_nothing_is_loaded_that_could_run_code(path):
    for name, given, where in calls(path):
        assert name not in FORBIDDEN, where
        if name == "torch.load":
            assert given.get("weights_only") == "True", where
        if name in ("np.load", "numpy.load"):
            assert given.get("allow_pickle") == "False", where
        assert given.get("shell") in (None, "False"), where


def test_the_scan_sees_what_it_looks_for(tmp_path):
    for bad in ("torch.load(f)", "np.load(f, allow_pickle=True)", "pickle.loads(b)", "eval('1')"):
        (tmp_path / "bad.py").write_text(bad)
        with pytest.raises(AssertionError):
            test_nothing_is_loaded_that_could_run_code(tmp_path / "bad.py")


# ---- targets -----------------------------------------------------------------------------------

EVIL = {"_target_": "os.system", "command": "true"}


@pytest.mark.parametrize(
    "node",
    [
        EVIL,
        {"_target_": "groupsae.training.optim.Adam", "base_lr": EVIL},
        {"_target_": "groupsae.sae.topk.TopK", "_partial_": True, "k": [{"a": [EVIL]}]},
        {"_target_": "groupsae.sae.topk.os.system"},
        {"_target_": "groupsae.config.arguments.start", "message": "x"},
        {"_target_": "hydra.utils.get_method", "path": "os.system"},
        {"_target_": "functools.partial"},
        {"_target_": "${oc.env:TARGET}"},
        {"_target_": ["groupsae.training.optim.Adam"]},
        {"_target_": "groupsae.training.optim.Adam", "_args_": [1]},
        {"_target_": "groupsae.training.optim.Adam", "_recursive_": False},
        {"_target_": "groupsae.training.optim.Adam", "_convert_": "none"},
        {"_target_": "groupsae.training.optim.Adam", "_partial_": "${oc.env:TARGET}"},
    ],
    ids=str,
)
def test_only_what_our_files_name_is_built(node, monkeypatch):
    monkeypatch.setenv("TARGET", "os.system")
    monkeypatch.setattr(os, "system", lambda *_: pytest.fail("code was run"))
    for form in (node, OmegaConf.create(node), OmegaConf.create({"inner": [node]})):
        with pytest.raises(UserError):
            make(form)


def test_classes_that_our_files_name_are_allowed_and_no_complete_room():
    assert "groupsae.sae.topk.TopK" in allowed()
    assert not any(name.startswith(("hydra", "os.", "builtins")) for name in allowed())


def test_a_class_of_ones_own_is_allowed_by_the_environment_only(monkeypatch):
    node = {"_target_": "fractions.Fraction", "numerator": 3}
    with pytest.raises(UserError, match="GROUPSAE_TARGETS=my_package.MyClass"):
        make(node)
    monkeypatch.setenv("GROUPSAE_TARGETS", "decimal.Decimal, fractions.Fraction")
    assert make(node) == 3


def test_an_argument_that_a_class_does_not_have_is_a_sentence():
    with pytest.raises(UserError, match=r"groupsae\.training\.optim\.Adam: .*unexpected.*'width'"):
        make({"_target_": "groupsae.training.optim.Adam", "_partial_": True, "width": 1})


# ---- a stranger's run folder -------------------------------------------------------------------


@pytest.fixture
def stranger(tmp_path, tiny_lm, tiny_text):
    """Return a function that writes a finished run's configuration with changes."""

    def write(changes):
        cfg = runs.composed(runs.overrides(tiny_lm, tiny_text, tmp_path))
        plain = OmegaConf.to_container(cfg, resolve=False)
        for key, value in changes.items():
            *parents, last = key.split(".")
            node = plain
            for each in parents:
                node = node[each]
            node[last] = value
        (tmp_path / ".hydra").mkdir(exist_ok=True)
        save_config(OmegaConf.create(plain), tmp_path / ".hydra" / "config.yaml")
        (tmp_path / "summary.json").write_text("{}")
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"sae._target_": "os.system"},
            r"_target_ is 'os\.system', which a configuration may not",
        ),
        ({"logger": {"x": EVIL}}, "may not name"),
        ({"model.name": "${oc.env:HOME}/x"}, r"holds '\$\{oc\.env:HOME\}/x', which could read"),
        ({"data.path": "a-${ oc.decode:${oc.env:HOME}}"}, "could read what is secret"),
        (
            {"data.path": "${oc.${seed}:HOME}"},
            r"holds '\$\{oc\.\$\{seed\}:HOME\}'",
        ),
        ({"data.path": "${${model.name}:HOME}"}, "could read what is secret"),
        ({"data.path": "${oc.env.${.a.${.b}}:HOME}"}, "could read what is secret"),
        ({"data.path": "${run_folder:${oc.env:HOME}}"}, "could read what is secret"),
        ({"model.load": {"${oc.env:HOME}": 1}}, "could read what is secret"),
        ({"model.load": {"trust_remote_code": True}}, r"would run code.*trust_remote_code=true"),
        ({"model.load": {"attn_implementation": "someone/kernel"}}, "attn_implementation would"),
    ],
)
def test_a_strangers_run_folder_runs_nothing_and_asks_nothing(stranger, changes, sentence):
    folder = stranger(changes)
    with pytest.raises(UserError, match=sentence):
        finished_run(folder, trusted=False)
    (folder / "summary.json").unlink()
    again = [f"output={folder}", "model=tiny", f"resume={folder}"]
    with (
        pytest.raises(UserError, match=sentence.replace("trust_remote_code=true", "")),
        open_run(runs.composed(again), again[2:]),
    ):
        pass


@pytest.mark.parametrize("plain", ["${.a.${.b}}", "${seed}:x", "{a: ${seed}}", "${run_folder:}"])
def test_references_within_the_configuration_are_accepted(stranger, plain):
    finished_run(stranger({"model.name": plain}), trusted=False)


def test_who_trusts_the_models_code_says_so(stranger):
    folder = stranger({"model.load": {"trust_remote_code": True}})
    assert finished_run(folder, trusted=True).model.load.trust_remote_code
    again = [f"resume={folder}", "+model.load.trust_remote_code=true"]
    with open_run(runs.composed(again), again) as opened:
        assert opened.cfg.model.load.trust_remote_code


def test_what_comes_from_the_environment_is_saved_plain(tmp_path, monkeypatch, tiny_lm):
    monkeypatch.setenv("CORPUS", "some/corpus")
    cfg = runs.composed(runs.overrides(tiny_lm, "${oc.env:CORPUS}", tmp_path))
    cfg.groups.rule = "${.theta}"
    check_own(cfg)
    raw = OmegaConf.to_container(cfg, resolve=False)
    assert raw["data"]["path"] == "some/corpus"
    assert raw["logger"]["csv"]["folder"] == "${run_folder:}"
    assert raw["groups"]["rule"] == "${.theta}"


def test_weights_are_never_unpickled_with_code():
    for option in ("weights_only", "pickle_module"):
        with pytest.raises(UserError, match=option):
            check_load_options({option: False})


# ---- secrets -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argument",
    [
        f"+model.load.token={SECRET}",
        "+data.token=abc",
        f"data.path={SECRET}",
        "data.path=https://me:word@somewhere.org/x",
        "+logger.wandb.api_key=0123",
        "model.name=planted-in-the-environment",
        "+trainer.a={b: [{password: x}]}",
        "+data.Client-Secret=abc",
        "+data.aws_secret_access_key=abc",
        "data.path='https://hub.org/x.parquet?X-Amz-Signature=0123'",
        "model.name=planted/with+a/slash",
    ],
)
def test_a_secret_is_refused_before_it_is_written(argument, monkeypatch, tmp_path, tiny_lm):
    monkeypatch.setenv("WANDB_API_KEY", "planted-in-the-environment")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted/with+a/slash")
    more = ["logger=wandb", argument] if "logger" in argument else [argument]
    arguments = runs.overrides(tiny_lm, "text", tmp_path, *more)
    with (
        pytest.raises(UserError, match="run folders keep their configuration") as raised,
        open_run(runs.composed(arguments), arguments),
    ):
        pass
    assert "HF_TOKEN" in str(raised.value)
    assert not any(x in str(raised.value) for x in (SECRET, "word@", "0123", "planted"))
    assert not list(tmp_path.rglob("*"))


def test_variables_that_only_sound_like_secrets_prove_nothing(monkeypatch):
    monkeypatch.setenv("TOKENIZER_NAME", "EleutherAI/pythia-160m")
    monkeypatch.setenv("MY_SECRET_PROJECT", "EleutherAI/pythia-160m")
    check_own(runs.composed(["model=hf", "model.name=EleutherAI/pythia-160m"]))
    message = "cannot load model 'EleutherAI/pythia-160m'"
    assert str(UserError(message)) == message


def test_what_is_no_secret_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path))
    assert secret_in({"output": f"{tmp_path}/x", "notes": "Basic experiments"}) is None
    cfg = runs.composed(["model=tiny"])
    assert secret_in(OmegaConf.to_container(cfg, resolve=False)) is None
    assert secret_in({"token": None, "column": "tokens", "path": "a@b:c/d"}) is None


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("https://me:secret@hub.org/a", "https://***@hub.org/a"),
        (
            "https://hub.org/?X-Amz-Signature=secret&b=1",
            "https://hub.org/?X-Amz-Signature=***&b=1",
        ),
        ("Authorization: Bearer secretsecret", "Authorization: Bearer ***"),
        (f"token {SECRET}", "token hf_***"),
        ("the key planted-in-the-environment", "the key ***"),
        ("row 12 of a@b.org, https://hub.org/a", "row 12 of a@b.org, https://hub.org/a"),
    ],
)
def test_secrets_are_removed_from_messages_of_libraries(message, shown, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "planted-in-the-environment")
    assert redacted(message) == shown
    assert str(UserError(message)) == shown


# ---- a finished run ----------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o027, 0o002])
def test_files_have_the_users_umask_and_no_secret(
    umask, tmp_path, tiny_lm, tiny_text, monkeypatch, capfd
):
    key = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = ["logger=wandb"] if umask == 0o027 else []
    before = os.umask(umask)
    try:
        arguments = runs.overrides(tiny_lm, tiny_text, tmp_path / "out", *logger, "evaluate=true")
        status, folder = runs.run(arguments)
    finally:
        os.umask(before)
    assert status == 0
    message = "".join(capfd.readouterr())
    assert SECRET not in message
    assert key not in message
    found = [tmp_path / "out", *(tmp_path / "out").rglob("*")]
    assert len(found) > 30
    for path in found:
        if "wandb" not in path.parts[len(folder.parts) :]:  # W&B's own
            full = 0o777 if path.is_dir() else 0o666
            assert path.stat().st_mode & 0o777 == full & ~umask, path
        if path.is_file():
            content = path.read_bytes()
            assert SECRET.encode() not in content, path
            assert key.encode() not in content, path


def test_a_configuration_of_a_hundred_levels_is_looked_at_as_well():
    node = EVIL
    for _ in range(100):
        node = {"a": [node]}
    with pytest.raises(UserError, match=r"os\.system"):
        check_targets(node)

"""Models in GGUF files, where the packages for them are installed (pip install .[gguf])."""

from pathlib import Path

import pytest
import torch

from benchmarks.real_models.packages import convert_gguf
from benchmarks.real_models.tiny import write_gguf
from groupsae.runtime.errors import UserError
from tests.helpers.lms import frozen

pytest.importorskip("gguf")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:gguf")

LOAD = {"gguf_file": "m.gguf"}
TOKENS = torch.arange(20)[None]


def test_config_tokenizer_and_weights_come_from_the_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    lm = frozen(tmp_path, load=LOAD)
    ids = lm.tokenizer()("ab c")["input_ids"]
    assert lm.tokenizer().decode(ids) == "ab c"
    convert_gguf(tmp_path / "m.gguf", tmp_path / "plain")
    plain, read = (
        each.load_with_head(torch.device("cpu")).acts(TOKENS, [0, 3])
        for each in (frozen(tmp_path / "plain"), lm)
    )
    assert all(torch.equal(plain[layer], read[layer]) for layer in (0, 3))


def test_the_fingerprint_is_that_of_the_content(tmp_path: Path) -> None:
    keys = []
    for seed in (0, 0, 1):
        write_gguf(tmp_path / "m.gguf", seed)
        keys.append(frozen(tmp_path, load=LOAD).fingerprint())
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize("kept", [10, 3_000, 20_000, -1])
def test_a_truncated_file_is_refused_before_the_weights_are_read(
    kept: int, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[:kept])
    with pytest.raises(UserError, match="cannot read model from .*m.gguf.* truncated or damaged"):
        frozen(tmp_path, load=LOAD)

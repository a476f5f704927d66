"""The latents' page in a real Chromium from file://: what it shows, and a silent console.

Skipped where no Chromium is installed.
"""

import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest

from groupsae.files.atomic import write_json
from groupsae.files.reading import read_json
from groupsae.interpretation import page as pages
from groupsae.interpretation.explain import Explainer, explain_sae
from groupsae.interpretation.files import Interpretation
from groupsae.interpretation.page import one_latent, write_page
from groupsae.runtime.errors import UserError
from groupsae.suite.suite import load_suite
from tests.helpers.interpreted import interpreted_run

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
real = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
SAE = "layers.0-1"


def opened(page: Path, address: str = "", *, silent: bool = True) -> str:
    """Return the main part of a page as Chromium has made it; silent: nothing was logged."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000"]
    url = f"{page.resolve().as_uri()}{address}"
    done = subprocess.run(
        [str(CHROMIUM), *flags, "--enable-logging=stderr", "--dump-dom", url],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert not silent or "CONSOLE" not in done.stderr, done.stderr
    return done.stdout.partition("<main")[2].partition("</main>")[0]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Interpretation:
    """Return an interpretation with rules; among its tokens are `</script>` and worse."""
    run = interpreted_run(tmp_path_factory.mktemp("page")).run
    file = run / "interpretation" / "collected" / "collected.json"
    write_json(
        file, {**(read_json(file) or {}), "model": "</script><b>tiny", "hookpoint": "resid_post"}
    )
    found = Interpretation(run / "interpretation")
    explainer = Explainer(found)
    saes = {}
    for name in found.saes:
        run_parts = partial(map, partial(explainer.explain, name))
        saes[name], _ = explain_sae(found, name, 4, run_parts)
    write_json(found.folder / "explanations.json", {"format": 1, "key": ["k", 4], "saes": saes})
    return Interpretation(found.folder)


@pytest.fixture(scope="module")
def page(found) -> Path:
    return write_page(found, "tiny </script><script>alert(1)</script>")


def explained_latent(found) -> int:
    """Return the latent that was explained at both of its layers."""
    rows = found.explanations[SAE]["latents"]
    return next(row["latent"] for row in rows if len(row["layers"]) == 2)


@real
def test_the_list_has_every_latent_and_can_be_searched_by_its_address(page, found):
    total = sum(sae.d_sae for sae in found.saes.values())
    shown = opened(page)
    assert f"{total} of {total} latents" in shown
    assert len(re.findall(r'<a href="#layers', shown)) == 2 * min(total, 100)
    one = opened(page, f"#?sae={SAE}&sort=latent&down=false")
    assert f"{found.saes[SAE].d_sae} of {total} latents" in one
    assert re.findall(r'href="#layers[.]0-1/(\d+)"', one)[::2] == [str(i) for i in range(48)]
    text = found.explanations[SAE]["latents"][0]["all"]["text"]
    assert text  # search is for a text, taken literally
    named = opened(page, "#?text=no+latent+has+this")
    assert f"0 of {total} latents" in named


@real
def test_a_latents_page_shows_its_rules_and_where_they_hold(page, found):
    latent = explained_latent(found)
    shown = opened(page, f"#{SAE}/{latent}/1")
    row = next(r for r in found.explanations[SAE]["latents"] if r["latent"] == latent)
    for place in ("0", "1"):
        f1 = row["layers"][place]["scores"]["f1"]
        assert re.search(rf"layer {place}</td><td>.*?</td><td class=\"number\">{f1:.3f}", shown)
    assert "Transfer τ" in shown
    assert f"AUPRC {row['all']['scores']['unigram_auprc']:.3f}" in shown
    assert "Highest activations at layer 1" in shown
    assert 'aria-pressed="true">1<' in shown


@real
def test_a_latents_page_shows_what_judges_say(found, tmp_path):
    latent = explained_latent(found)
    scores = {"detection": {"own": {"f1": 0.7}, "null": {"f1": 0.2}}}
    row = {"latent": latent, "explanation": "closing </script> tags", "judge": scores}
    copy = Interpretation(Path(shutil.copytree(found.folder, tmp_path / "interpretation")))
    for name, qualified in (("endpoint <b>m", True), ("hf n", False)):
        one = {
            "collected": "k",
            "judge": {"name": name},
            "qualification": {"qualified": qualified},
            "saes": {SAE: {"latents": [row]}},
        }
        write_json(copy.folder / "judged" / f"{qualified}-1.json", one)
    page = write_page(copy, "judged")
    shown = opened(page, f"#{SAE}/{latent}")
    assert "endpoint &lt;b&gt;m" in shown
    assert "closing &lt;/script&gt; tags" in shown
    assert "detection F1 0.70 (null 0.20)" in shown
    assert "no scores: the judge is not qualified" in shown
    assert f"1 of {sum(s.d_sae for s in found.saes.values())} latents" in opened(
        page, "#?text=closing"
    )


@real
def test_tokens_are_shown_as_text_whatever_they_hold(page, found):
    shown = "".join(opened(page, f"#{SAE}/{latent}") for latent in (0, 1))
    assert "&lt;/script&gt;" in shown
    assert "<script" not in shown
    for text in ("\ufffd", "漢", "⏎", "t40"):
        assert text in shown


@real
def test_a_large_page_reads_its_data_from_files_next_to_it(found, tmp_path, monkeypatch):
    copy = Interpretation(Path(shutil.copytree(found.folder, tmp_path / "interpretation")))
    monkeypatch.setattr(pages, "MOST_INLINE", 1000)
    page = write_page(copy, "large")
    assert page.stat().st_size < 100_000
    assert sorted(f.name for f in (copy.folder / "data").iterdir())[0] == f"{SAE}.0.js"
    latent = explained_latent(found)
    assert "Transfer τ" in opened(page, f"#{SAE}/{latent}")
    shutil.rmtree(copy.folder / "data")
    assert f"data/{SAE}.0.js is missing" in opened(page, f"#{SAE}/{latent}", silent=False)


@real
def test_a_notebook_shows_the_latent_inline(found, tmp_path):
    suite, latent = load_suite(found.folder.parent), explained_latent(found)
    shown = suite.dashboard(layer=1, latent=latent)
    page = tmp_path / "one.html"
    shown.save(page)
    assert "Highest activations at layer 1" in opened(page)
    assert shown.html == one_latent(found, SAE, latent, 1)
    assert len(shown.html) < 100_000  # nothing of the other latents
    frame = shown._repr_html_()
    assert frame.startswith('<iframe srcdoc="')
    assert "<script" not in frame  # what it holds is escaped: it cannot touch the notebook


def test_a_suite_without_pages_says_what_to_do(found, tmp_path):
    suite = load_suite(found.folder.parent)
    with pytest.raises(UserError, match=r"was not interpreted.*groupsae.interpret run="):
        suite.dashboard(layer=1, latent=2, interpretation=tmp_path)
    with pytest.raises(UserError, match="has latents 0 to 47"):
        suite.dashboard(layer=1, latent=48)
    with pytest.raises(UserError, match="no SAE for layer 2"):
        suite.dashboard(layer=2, latent=0)

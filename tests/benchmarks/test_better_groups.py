"""What the study of better groups concludes from figures whose answer is known."""

import pytest

from benchmarks.better_groups import (
    BIASES,
    GROUP,
    LAYERS,
    MAPS,
    STARTED,
    Figures,
    Study,
    arms_of,
    at_equal_flops,
    compared,
    verdict,
)

*_, SEVERAL = arms_of(["2"], started=False)


def run(fvu: float, flops: int, sae_flops: int, tokens: int = 1000) -> Figures:
    return Figures(tokens, 100, flops, 200, sae_flops, fvu, 0.3, 0.01, 0.8, 0.4, 0.9)


FOUND = {
    LAYERS: [run(0.20, 1200, 800), run(0.22, 1200, 800)],
    GROUP: [run(0.24, 700, 300), run(0.26, 700, 300)],
    BIASES: [run(0.23, 700, 300), run(0.25, 700, 300)],
    MAPS: [run(0.22, 707, 307), run(0.24, 707, 307)],
    SEVERAL: [run(0.19, 800, 400), run(0.22, 800, 400)],
}


def test_the_goals_are_the_share_of_the_gap_and_the_fvu_of_one_sae_per_layer() -> None:
    biases, maps, several, _ = verdict(FOUND)
    assert (
        "25 ± 0 % of the gap between *group (the paper's)* and one SAE per layer closed for 0.0%"
        in biases
    )
    assert biases.endswith("not met.")
    assert "one SAE per layer closed for 1.0% more FLOPs" in maps
    assert maps.endswith("2 %): met.")
    assert "FVU -0.0050 ± 0.0635 against one SAE per layer at 50% of its SAE FLOPs" in several
    assert several.endswith("50 %): met.")
    worse = FOUND | {SEVERAL: [run(0.19, 800, 401), run(0.22, 800, 401)]}
    assert verdict(worse)[2].endswith("not met.")
    fair = FOUND | {STARTED: [run(0.235, 700, 300), run(0.255, 700, 300)]}  # a gap of 0.035
    assert verdict(fair)[0].startswith(f"- *{BIASES}*: 14 ± 0 % of the gap between *{STARTED}*")


def test_at_equal_flops_what_is_cheaper_reads_more_text_in_full_steps() -> None:
    study = Study(["0", "1"], 1000, 1, ["1e-3"], [], {})
    tokens = at_equal_flops(study, FOUND)
    assert tokens[LAYERS] == 1000
    assert tokens[GROUP] == 2000  # (1200 - 200) / (700 - 200), of 200 that no token changes
    assert tokens[SEVERAL] == 1660  # 1666 in steps of 10
    assert BIASES not in tokens


@pytest.mark.parametrize(
    ("arm", "shown"), [(LAYERS, "| 100% | 100.0% |"), (GROUP, "| +0.0400 ± ")]
)
def test_the_table_is_relative_to_one_sae_per_layer(arm: str, shown: str) -> None:
    (line,) = (line for line in compared(FOUND) if line.startswith(f"| {arm} |"))
    assert shown in line

"""A run that is killed, at any moment, resumes with the same command, to the same bits."""

import random
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.chaos.program import SEVERAL, TOKENS_PER_STEP, resumed_from

pytestmark = pytest.mark.slow

KILLS, SEED = 20, 6
PHASES = [  # as in faulty.py
    "other", "packing", "measuring", "training", "checkpoint", "saving", "evaluating",
]  # fmt: skip


def chosen(moments) -> list[tuple[str, int, float]]:
    """Return (phase, moment, delay) of every kill: the phases in turn, a moment of each."""
    of_phase = {phase: [] for phase in PHASES}
    for line in moments.read_text().splitlines():
        number, phase, _ = line.split(" ", 2)
        of_phase[phase].append(int(number))
    chance = random.Random(SEED)
    kills = []
    for number in range(KILLS):
        phase = PHASES[number % len(PHASES)]
        # half of them at the moment itself, half a little later: in the middle of what follows
        delay = chance.choice([0, chance.uniform(0, 0.1)])
        kills.append((phase, chance.choice(of_phase[phase]), delay))
    return kills


def test_sigkill_at_random_moments(undisturbed, expected, program, row):
    kills = chosen(undisturbed.place / "moments")
    print(f"seed {SEED}: {kills}")  # noqa: T201

    def one(kill) -> int:
        phase, moment, delay = kill
        victim = program()
        killed = victim.run(kill=moment, delay=delay)
        assert killed.status == -signal.SIGKILL or (delay and killed.status == 0), killed.output
        last = victim.last_step()
        again = victim.run()
        assert again.status == 0, (kill, again.output)
        finished = "finished before" in again.output
        assert finished or resumed_from(again) == last, (kill, last, again.output)
        assert victim.results() == expected, kill
        return killed.status == -signal.SIGKILL

    with ThreadPoolExecutor(2) as pool:
        died = sum(pool.map(one, kills))
    assert died >= KILLS - 3
    count = Counter(phase for phase, _, _ in kills)
    row(
        f"SIGKILL at {KILLS} random moments (seed {SEED}): "
        + ", ".join(f"{n} x {phase}" for phase, n in count.items()),
        "the same command resumes from the last checkpoint to the same result, bit for bit",
        f"{KILLS} of {KILLS} equal in weights and evaluation",
    )


def test_sigterm(expected, program, row):
    victim = program()
    stopped = victim.run(step=5, send=int(signal.SIGTERM))
    assert stopped.status == 128 + signal.SIGTERM, stopped.output
    assert "stopped at step 5 of 12; resume with" in stopped.output
    assert victim.last_step() == 5
    again = victim.run()
    assert again.status == 0, again.output
    assert resumed_from(again) == 5
    assert victim.results() == expected
    row(
        "SIGTERM in step 5",
        "a checkpoint of that step, the command that resumes, exit status 143",
        "so; afterwards equal bit for bit",
    )


@pytest.mark.parametrize("both", [False, True], ids=["one", "all"])
def test_kills_among_two_processes(both, of_two, program, row):
    trainer, expected_of_two = of_two
    victim = program(f"trainer={trainer}", *SEVERAL)
    ended = victim.run(step=8, send=int(signal.SIGKILL), rank=0 if both else 1)
    assert ended.status != 0
    if not both:
        assert "lost" in ended.output, ended.output
        assert "Traceback" not in ended.output, ended.output
    last = victim.last_step()
    assert last == 6
    again = victim.run()
    assert again.status == 0, again.output
    assert resumed_from(again) == last
    assert victim.results() == expected_of_two
    who = "the first of two processes" if both else "the second of two processes"
    row(
        f"SIGKILL of {who}, trainer={trainer}",
        "the other ends with a message, none is left over; the same command resumes, bit for bit",
        f"ended after {ended.seconds:.0f} s in all, afterwards equal bit for bit"
        f" ({(8 - last) * TOKENS_PER_STEP:,} tokens since the last checkpoint were trained again)",
    )

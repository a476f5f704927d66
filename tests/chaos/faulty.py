"""The training command with a fault in it: `CHAOS='{"kill": 17}' python faulty.py <overrides>`.

The program is the real one; before it starts, this script puts one fault into the process. What
CHAOS says is JSON: `rank`, the process that the fault is for (0), and one of

    record: <file>          write down every moment that files of the run are touched
    kill: <moment>          SIGKILL at that moment, `delay` seconds later
    step: <n>               at the end of that step, `send` a signal, or `wait` for a file
    nan: <n>                in the text of that step the activations of `layer` are not finite
    clock: true             the clock and the time zone jump all the time
    limit: <bytes>          no file can become larger
"""

import json
import os
import random
import resource
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link")
PHASES = {  # part of a path -> what the run is doing
    "/tokens/": "packing",
    "/angles": "measuring",
    "groups.json": "measuring",
    "/checkpoints": "checkpoint",
    "/saes": "saving",
    "training.png": "saving",
    "ledger.json": "saving",
    "summary.json": "saving",
    "/evaluation": "evaluating",
    "metrics.csv": "training",
}


def moments(act) -> None:
    """Call `act(number, phase, path)` whenever the run's files are opened, named or removed."""
    count, pid = 0, os.getpid()
    output = next(a.split("=", 1)[1] for a in sys.argv if a.startswith("output="))

    def heard(event: str, arguments: tuple) -> None:
        nonlocal count
        if event not in EVENTS or os.getpid() != pid:
            return
        path = str(arguments[0])
        if output not in path:
            return
        phase = next((name for part, name in PHASES.items() if part in path), "other")
        count += 1
        act(count, phase, path)

    sys.addaudithook(heard)


def record(file: str) -> None:
    handle = os.open(file, os.O_WRONLY | os.O_CREAT)
    moments(lambda number, phase, path: os.write(handle, f"{number} {phase} {path}\n".encode()))


def kill_later(delay: float) -> None:
    if delay == 0:
        os.kill(os.getpid(), 9)
    timer = threading.Timer(delay, os.kill, (os.getpid(), 9))
    timer.daemon = True
    timer.start()


def at_step(number: int, fault: dict) -> None:
    from groupsae.training.callbacks.throughput import Throughput

    before = Throughput.on_train_batch_end

    def end(self, trainer, *rest) -> None:
        before(self, trainer, *rest)
        if trainer.global_step != number:
            return
        if "send" in fault:
            os.kill(os.getpid(), fault["send"])
        else:
            Path(fault["wait"]).with_suffix(".waiting").touch()
            while not Path(fault["wait"]).exists():
                time.sleep(0.05)

    Throughput.on_train_batch_end = end


def spoil(step: int, layer: int) -> None:
    import torch

    from groupsae.data.activations import ActivationDataModule
    from groupsae.lm.hooked import HookedLM

    bad = []
    before, run = ActivationDataModule.on_before_batch_transfer, HookedLM.run

    def choose(self, batch, index):
        if self.trainer.training and self.trainer.global_step == step - 1 and not bad:
            bad.append(batch[0].clone())
        return before(self, batch, index)

    def run_spoilt(self, inputs, layers, visit, stop):
        def see(at, acts):
            if at == layer and bad:
                same = (inputs["input_ids"].cpu() == bad[0]).all(1).to(acts.device)
                acts = torch.where(same[:, None, None], torch.nan, acts)
            return visit(at, acts)

        return run(self, inputs, layers, see, stop)

    ActivationDataModule.on_before_batch_transfer, HookedLM.run = choose, run_spoilt


def jumping_clock() -> None:
    chance, now = random.Random(0), time.time

    def jumped() -> float:
        return now() + chance.uniform(-1, 1) * timedelta(days=400).total_seconds()

    def zones() -> None:
        while True:
            os.environ["TZ"] = chance.choice(["Pacific/Kiritimati", "Pacific/Niue", "Asia/Tehran"])
            time.tzset()
            time.sleep(0.02)

    time.time = jumped
    time.time_ns = lambda: int(jumped() * 1e9)
    threading.Thread(target=zones, daemon=True).start()


def install(fault: dict) -> None:
    """Put the fault into this process, if it is the one that is meant."""
    if int(os.environ.get("LOCAL_RANK", "0")) != fault.get("rank", 0):
        return
    if "record" in fault:
        record(fault["record"])
    if "kill" in fault:
        moments(lambda n, *_: kill_later(fault.get("delay", 0)) if n == fault["kill"] else None)
    if "step" in fault:
        at_step(fault["step"], fault)
    if "nan" in fault:
        spoil(fault["nan"], fault["layer"])
    if "clock" in fault:
        jumping_clock()
    if "limit" in fault:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["limit"], fault["limit"]))


if __name__ == "__main__":
    from groupsae.train import main

    install(json.loads(os.environ.get("CHAOS", "{}")))
    main()

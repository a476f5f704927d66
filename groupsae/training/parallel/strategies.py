"""Lightning's strategies for several processes, as the yaml files name them."""

import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.strategy import Strategy
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.optim import Optimizer

from groupsae.runtime.compat import release_started_processes
from groupsae.runtime.errors import UserError
from groupsae.training.checkpoints.io import SuiteCheckpoints, save_together
from groupsae.training.suite import GroupSAESuite

END = 10.0  # seconds that other processes have to end after an error in the one that started them


class DDP(DDPStrategy):
    """Every process holds all SAEs and trains them on its share of a step's rows.

    Args:
        timeout_minutes: how long a process waits for another before the run ends with an error.
    """

    def __init__(self, *, timeout_minutes: float) -> None:
        if timeout_minutes <= 0:
            raise UserError(
                f"trainer.strategy.timeout_minutes is {timeout_minutes}: it must be above 0."
            )
        super().__init__(
            timeout=timedelta(minutes=timeout_minutes),
            broadcast_buffers=False,  # the step itself reduces counters and thresholds
            gradient_as_bucket_view=True,  # no second copy of the gradients
        )

    def check_processes(self) -> None:
        """Raise ValueError if torchrun or SLURM started another number of processes."""
        assert self.cluster_environment is not None
        self.cluster_environment.validate_settings(self.num_processes, self.num_nodes)

    def on_exception(self, exception: BaseException) -> None:
        """Wait for the processes that this one started, which see the same error; end the rest."""
        super().on_exception(exception)
        deadline = time.monotonic() + END
        for process in release_started_processes(self.launcher):
            with suppress(TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            process.kill()  # does nothing to one that has ended

    def teardown(self) -> None:
        """Let the processes that this one started end with any status, as this one does."""
        release_started_processes(self.launcher)
        super().teardown()


class SAEParallel(DDP):
    """Every SAE is held and trained by one process, on all rows of a step.

    The language model runs in all processes, each on its share of a step's blocks, and the rows
    go to the owners. No gradient is reduced and no optimiser state is held twice.
    """

    mesh: DeviceMesh

    def setup_distributed(self) -> None:
        """Lay the processes out on a mesh of one dimension."""
        super().setup_distributed()
        self.mesh = init_device_mesh(
            self.root_device.type, (self.world_size,), mesh_dim_names=("sae",)
        )

    def setup(self, trainer: L.Trainer) -> None:
        """Set optimisers up; nothing is made equal, as each process has its own SAEs."""
        Strategy.setup(self, trainer)

    def _setup_model(self, model: torch.nn.Module) -> torch.nn.Module:  # type: ignore[override]
        return model

    # ---- checkpoints: each process its own SAEs ------------------------------------------

    @property
    def suite(self) -> GroupSAESuite:
        """Return the module that is trained."""
        assert isinstance(self.lightning_module, GroupSAESuite)
        return self.lightning_module

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint that any number of processes can resume from."""
        save_together(checkpoint, Path(filepath))

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read this process's SAEs and the part that belongs to no SAE."""
        assert isinstance(self.checkpoint_io, SuiteCheckpoints)
        return self.checkpoint_io.load_checkpoint(checkpoint_path, members=self.suite.own)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the optimiser's state; empty without an SAE."""
        if not self.suite.own:
            return {"state": {}, "param_groups": []}
        return super().optimizer_state(optimizer)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore the optimiser's state, if any."""
        if self.suite.own:
            super().load_optimizer_state_dict(checkpoint)

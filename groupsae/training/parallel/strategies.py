"""Lightning's strategies for several processes, as the yaml files name them."""

from datetime import timedelta
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.strategy import Strategy
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from groupsae.training.parallel.launcher import WatchedLauncher


class DDP(DDPStrategy):
    """Every process holds all SAEs and trains them on its share of a step's rows.

    Args:
        timeout_minutes: that a process waits for another before the run ends with an error.
        **arguments: of Lightning's `DDPStrategy`.
    """

    def __init__(self, *, timeout_minutes: float, **arguments: Any) -> None:
        super().__init__(
            timeout=timedelta(minutes=timeout_minutes),
            broadcast_buffers=False,  # the step itself reduces counters and thresholds
            **arguments,
        )

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._launcher = WatchedLauncher(
            self.cluster_environment, self.num_processes, self.num_nodes
        )


class SAEParallel(DDP):
    """Every SAE is held and trained by one process, on the rows of a whole step.

    The language model runs in all processes, each on its share of a step's blocks, and the rows
    go to the owners. No gradient is reduced and no optimiser state is held twice.

    Args:
        timeout_minutes: that a process waits for another before the run ends with an error.
        **arguments: of Lightning's `DDPStrategy`.
    """

    mesh: DeviceMesh

    def setup_distributed(self) -> None:
        """Lay the processes out on a mesh of one dimension."""
        super().setup_distributed()
        self.mesh = init_device_mesh(
            self.root_device.type, (self.world_size,), mesh_dim_names=("sae",)
        )

    def setup(self, trainer: L.Trainer) -> None:
        """Set optimisers up; nothing is wrapped or made equal, as each process has its own SAEs."""
        Strategy.setup(self, trainer)

    def _setup_model(self, model: torch.nn.Module) -> torch.nn.Module:  # type: ignore[override]
        return model

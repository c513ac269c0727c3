"""A teacher whose layers are spread over the processes (FSDP2): each keeps a part, and whoever reads has one layer whole at a time.

A layer is put together by all processes at once, but they do not read equally often: their texts differ in length. So they read
in step. Before each read all say whether they have one, and whoever has none lends its parts in a read of one token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from switchkd.errors import UserError
from switchkd.models.heads import backbone, evaluating
from switchkd.models.layers import decoder_layers

# Those that may be read now. All processes open and close them at the same places of the code.
_OPEN: list[SharedTeacher] = []


class SharedTeacher:
    """Spreads the decoder layers of `teacher` over all processes; embedding, last norm and head stay whole in each.

    From then on it is read inside `open()`. Raises UserError for one process, and for a model whose
    layers are not found.
    """

    def __init__(self, teacher: PreTrainedModel, device: torch.device) -> None:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            raise UserError(
                "teacher_offload is 'shared', but there is one process to share among; start several (torchrun "
                "--nproc-per-node N -m switchkd train ...), or take cpu or disk"
            )
        layers = decoder_layers(teacher)
        if layers is None:
            raise UserError(
                f"teacher_offload is 'shared', but switchkd does not know where {type(teacher).__name__} keeps its layers; take "
                f"cpu or disk"
            )
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        outside = [child for child in backbone(teacher).children() if child is not layers]
        for module in (*outside, cast(nn.Module, teacher.get_output_embeddings())):
            module.to(device)
        for layer in layers:
            # It is moved here, so that no two layers are whole on the device at a time.
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        self.teacher = teacher
        self.device = device
        self._lending = False
        backbone(teacher).register_forward_pre_hook(self._before_read)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Inside, processes may read, each as often as it has to; at the end they have waited for each other."""
        _OPEN.append(self)
        try:
            yield
        finally:
            self.lend()
            _OPEN.remove(self)

    def _before_read(self, *_: object) -> None:
        if not self._lending:
            self._readers(1)

    def _readers(self, mine: int) -> int:
        """The number of processes that are about to read."""
        count = torch.tensor(mine, device=self.device)
        dist.all_reduce(count)
        return int(count)

    def lend(self) -> None:
        """Take part in the reads of the others until no process has one left."""
        self._lending = True
        try:
            with evaluating(self.teacher):
                while self._readers(0):
                    backbone(self.teacher)(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device))
        finally:
            self._lending = False


def let_others_read() -> None:
    """Let every process finish its reads of a shared teacher. Call it wherever the processes meet for anything else."""
    for teacher in _OPEN:
        teacher.lend()

"""The axes of the device mesh, and how many devices a config puts along each."""

import dataclasses

from errors import UserError

MESH_AXES = ("data", "fsdp", "expert", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh. At most one may be -1, which takes what is left."""

    data: int = -1  # rows of the batch; parameters are copies
    fsdp: int = 1  # rows of the batch; parameters are sharded
    expert: int = 1  # rows of the batch; experts are sharded
    tensor: int = 1  # heads, hidden widths of FFNs, and the vocabulary

    def __post_init__(self):
        for name in MESH_AXES:
            size = getattr(self, name)
            if size == 0 or size < -1:
                raise UserError(f"mesh.{name} = {size}: must be positive, or -1 for what is left")
        if sum(getattr(self, name) == -1 for name in MESH_AXES) > 1:
            raise UserError("mesh: only one axis may be -1")

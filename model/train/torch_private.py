"""Private names of PyTorch that model/train uses: check them when a new release breaks. activation.py has one more, and
model/weights those of DCP's reader.

    clear_sharding_caches          forgets meshes that no longer exist
    FsspecWriter                   DCP checkpoints in an object store
    mesh_info, DataParallelMeshInfo, ShardPlacementResult      FSDP units on separate meshes
    set_group_timeout              timeout of an existing process group
"""

from __future__ import annotations

from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter
from torch.distributed.distributed_c10d import _set_pg_timeout as set_group_timeout
from torch.distributed.fsdp._fully_shard._fsdp_common import DataParallelMeshInfo, ShardPlacementResult
from torch.distributed.fsdp._fully_shard._fsdp_init import _get_mesh_info as mesh_info
from torch.distributed.tensor._redistribute import _gen_transform_infos
from torch.distributed.tensor.debug import _clear_sharding_prop_cache


def clear_sharding_caches() -> None:
    """DTensor's caches refer to a mesh, and would give a later mesh of the same shape the ranks of the first."""
    _clear_sharding_prop_cache()
    _gen_transform_infos.cache_clear()


__all__ = [
    "DataParallelMeshInfo",
    "FsspecWriter",
    "ShardPlacementResult",
    "clear_sharding_caches",
    "mesh_info",
    "set_group_timeout",
]

"""Replicated weights are compared by a checksum of their bits, among the ranks that should have equal ones."""

from __future__ import annotations

import multiprocessing

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from model.train.parallel import replicas

pytestmark = pytest.mark.slow

SHARDED, WHOLE, EVERYWHERE, CUT = "replicas of shards", "a router", "plain", "no two alike"


def test_a_checksum_shows_every_change_of_one_number_and_of_two_that_cancel_out():
    weight = torch.randn(7, 11)
    sums = {int(replicas.checksum(weight))}
    assert sums == {int(replicas.checksum(weight.clone()))}
    bits = weight.view(torch.int32)
    changes = [(i, 1 << bit) for i in (0, 1, 76) for bit in range(31)]
    for i, added in changes:
        changed = bits.clone()
        changed.view(-1)[i] ^= added
        sums.add(int(replicas.checksum(changed.view(torch.float32))))
    up_and_down = bits.clone()
    up_and_down.view(-1)[2:4] += torch.tensor([1, -1], dtype=torch.int32)
    swapped = weight.clone()
    swapped.view(-1)[:2] = weight.view(-1)[[1, 0]]
    complement = ~bits
    for changed in (up_and_down.view(torch.float32), swapped, -weight, complement.view(torch.float32), weight.t()):
        sums.add(int(replicas.checksum(changed)))
    assert len(sums) == 1 + len(changes) + 5


def test_a_checksum_is_of_the_whole_however_it_is_cut(monkeypatch):
    weight = torch.randn(1000)
    expected = int(replicas.checksum(weight))
    monkeypatch.setattr(replicas, "CHUNK", 7)
    assert int(replicas.checksum(weight)) == expected
    assert int(replicas.checksum(torch.empty(0, 3))) == 0


def rank_main(folder, rank, ranks):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", ranks), rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "fsdp"))
    shard = rank % 2

    def weights(disturbed=None):
        result = {
            SHARDED: DTensor.from_local(
                torch.full((3, 2), float(shard)), mesh, [Replicate(), Shard(0)], run_check=False
            ),
            WHOLE: DTensor.from_local(torch.ones(4), mesh, [Replicate(), Replicate()], run_check=False),
            EVERYWHERE: torch.arange(5.0),
            CUT: DTensor.from_local(torch.full((2,), float(rank)), mesh, [Shard(0), Shard(0)], run_check=False),
        }
        if disturbed is not None:
            replicas.local_part(result[disturbed]).view(-1)[1] += 1e-6
        return result

    reported = [replicas.differing(weights())]
    for name, at in ((SHARDED, 3), (WHOLE, 1), (EVERYWHERE, 2), (CUT, 0)):
        reported.append(replicas.differing(weights(name if rank == at else None)))
    torch.save(reported, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """The report of each of 4 ranks, 2 replicas of 2 shards."""
    folder = tmp_path_factory.mktemp("ranks")
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=rank_main, args=(folder, rank, 4)) for rank in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [torch.load(folder / f"{rank}.pt") for rank in range(4)]


def test_every_rank_gets_the_names_of_weights_that_differ_on_any_rank(reported):
    assert reported == [[[], [SHARDED], [WHOLE], [EVERYWHERE], []]] * 4

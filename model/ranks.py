"""How ranks share a model and a batch: replicas x shard ranks, of which `expert_parallel` divide the experts.

Needs no torch, so that a wrong recipe is refused before any work; errors show the arithmetic.
"""

from __future__ import annotations

from typing import NamedTuple

from model.config import StageConfig, TrainSettings, TransformerConfig


class Degrees(NamedTuple):
    """Every rank has a share of the batch. `shard` ranks together hold one copy of the weights."""

    replicate: int
    shard: int
    expert_parallel: int

    @property
    def expert_shard(self) -> int:
        """Ranks that share the weights of one expert-parallel rank's experts (torchtitan's efsdp)."""
        return self.shard // self.expert_parallel


def rank_degrees(model: TransformerConfig, train: TrainSettings, ranks: int) -> Degrees:
    """The degrees that `train` sets for `ranks` processes.

    Raises:
        ValueError: a degree does not divide the ranks or the experts.
    """
    replicate, ep = train.data_parallel_replicate, train.expert_parallel
    world = f"the {ranks} ranks"
    check_divides(ranks, world, replicate, "train.data_parallel_replicate")
    shard = ranks // replicate if train.data_parallel_shard == -1 else train.data_parallel_shard
    if replicate * shard != ranks:
        raise ValueError(
            f"train.data_parallel_replicate={replicate} x train.data_parallel_shard={shard} = {replicate * shard}, "
            f"which is not {world}"
        )
    if train.muon_implementation == "torchtitan" and shard == 1:
        raise ValueError(
            f"train.muon_implementation='torchtitan' takes matrices that FSDP shards, and 1 rank holds all weights "
            f"({ranks} ranks / train.data_parallel_replicate={replicate}): give it more ranks, or take 'nucleus'"
        )
    degrees = Degrees(replicate, shard, ep)
    if ep > 1:
        check_divides(model.num_experts, f"model.num_experts={model.num_experts}", ep, "train.expert_parallel")
        check_divides(shard, f"the {shard} ranks that share the weights", ep, "train.expert_parallel")
        if model.routing.kind == "dense":
            raise ValueError(f"train.expert_parallel={ep} shares out experts, and model.routing.kind='dense' has none")
    experts = model.num_experts // ep
    if experts % degrees.expert_shard and any(model.is_moe_layer(i) for i in range(model.num_layers)):
        # Then each expert's matrices are sharded by rows, in equal parts.
        for name, rows in (("model width", model.width), ("moe_intermediate_dim", model.moe_intermediate_dim)):
            if rows % degrees.expert_shard:
                raise ValueError(
                    f"{degrees.expert_shard} ranks share {experts} experts: neither these ({remainder(experts, degrees.expert_shard)}) "
                    f"nor {name} {rows} ({remainder(rows, degrees.expert_shard)}) can be cut into equal parts"
                )
    return degrees


def micro_batch(stage: StageConfig, train: TrainSettings, ranks: int) -> int:
    """Samples of one rank and accumulation step: train.local_batch_size, or a rank's whole share if that is less."""
    share = max(1, stage.batch_size // ranks)
    return min(train.local_batch_size or share, share)


def local_batch_size(stage: StageConfig, train: TrainSettings, ranks: int) -> int:
    """`micro_batch`, checked.

    Raises:
        ValueError: the global batch is not a multiple of it times the ranks.
    """
    local = micro_batch(stage, train, ranks)
    if stage.batch_size % (local * ranks):
        raise ValueError(
            f"stage {stage.name}: batch_size={stage.batch_size} must be a multiple of {local * ranks} "
            f"(local_batch_size={local} x {ranks} ranks): {remainder(stage.batch_size, local * ranks)}"
        )
    return local


def check_divides(whole: int, what: str, part: int, name: str) -> None:
    """Raises ValueError, with the arithmetic, when `part` does not divide `whole`."""
    if part < 1 or whole < 1 or whole % part:
        rest = remainder(whole, part) if part > 0 else f"{name} is under 1"
        raise ValueError(f"{name}={part} must divide {what}: {rest}")


def remainder(whole: int, part: int) -> str:
    """The division with its remainder, for an error message."""
    return f"{whole} = {whole // part} x {part} + {whole % part}"

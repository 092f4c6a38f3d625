"""How ranks share a model and a batch: replicas x shard ranks, of which `expert_parallel` share out the experts.

Known without torch, so that a recipe is refused before any work, and with the arithmetic.
"""

from __future__ import annotations

from typing import NamedTuple

from model.config import StageConfig, TrainConfig, TransformerConfig

# What says how a run is computed, and not what: it may change between two attempts at the same training.
LAYOUT_KEYS = frozenset(
    ("nnodes", "nproc_per_node", "data_parallel_replicate", "data_parallel_shard", "expert_parallel")
    + ("local_batch_size", "activation_checkpointing", "compile", "deterministic")
    + ("attention_backend", "kernels", "muon_implementation", "latents")
)
# And what says how it reads, saves and tells.
KEEPING_KEYS = frozenset(
    ("async_checkpoint", "checkpoint_uri", "keep_full_checkpoints", "num_workers", "log_every_steps")
)
FREE_KEYS = LAYOUT_KEYS | KEEPING_KEYS


class Layout(NamedTuple):
    """Every rank has a share of the batch. `shard` ranks hold one copy of the weights between them."""

    replicate: int
    shard: int
    expert_parallel: int

    @property
    def expert_shard(self) -> int:
        """Ranks that share the weights of one expert-parallel rank's experts (torchtitan's efsdp)."""
        return self.shard // self.expert_parallel


def layout(model: TransformerConfig, train: TrainConfig, ranks: int) -> Layout:
    """The layout that `train` asks for on `ranks` processes.

    Raises:
        ValueError: the degrees do not fit the ranks or the experts.
    """
    replicate, ep = train.data_parallel_replicate, train.expert_parallel
    world = f"the {ranks} ranks"
    _divide(ranks, world, replicate, "train.data_parallel_replicate")
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
    found = Layout(replicate, shard, ep)
    if ep > 1:
        _divide(model.num_experts, f"model.num_experts={model.num_experts}", ep, "train.expert_parallel")
        _divide(shard, f"the {shard} ranks that share the weights", ep, "train.expert_parallel")
        if model.routing.kind == "dense":
            raise ValueError(f"train.expert_parallel={ep} shares out experts, and model.routing.kind='dense' has none")
    held = model.num_experts // ep
    if held % found.expert_shard and any(model.is_moe_layer(i) for i in range(model.num_layers)):
        # Then each expert's matrices are cut, along their rows, which must be equal parts.
        for name, rows in (("model width", model.width), ("moe_intermediate_dim", model.moe_intermediate_dim)):
            if rows % found.expert_shard:
                raise ValueError(
                    f"{found.expert_shard} ranks share {held} experts: neither these ({_rest(held, found.expert_shard)}) "
                    f"nor {name} {rows} ({_rest(rows, found.expert_shard)}) can be cut into equal parts"
                )
    return found


def micro_batch(stage: StageConfig, train: TrainConfig, ranks: int) -> int:
    """Samples of one rank and accumulation step: train.local_batch_size, or a rank's whole share where that is less."""
    share = max(1, stage.batch_size // ranks)
    return min(train.local_batch_size or share, share)


def local_batch_size(stage: StageConfig, train: TrainConfig, ranks: int) -> int:
    """`micro_batch`, checked.

    Raises:
        ValueError: the global batch is no whole number of them.
    """
    local = micro_batch(stage, train, ranks)
    if stage.batch_size % (local * ranks):
        raise ValueError(
            f"stage {stage.name}: batch_size={stage.batch_size} must be a multiple of {local * ranks} "
            f"(local_batch_size={local} x {ranks} ranks): {_rest(stage.batch_size, local * ranks)}"
        )
    return local


def _divide(whole: int, what: str, part: int, name: str) -> None:
    if whole % part:
        raise ValueError(f"{name}={part} must divide {what}: {_rest(whole, part)}")


def _rest(whole: int, part: int) -> str:
    return f"{whole} = {whole // part} x {part} + {whole % part}"

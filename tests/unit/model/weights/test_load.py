"""Released weights at a small size: loaded into models of any layout, and exported to the same files."""

import json
import shutil

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors.torch import load_file, save_file
from small_model import SMALL
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import model.weights.load
from model.config import TransformerConfig
from model.transformer import NucleusTransformer
from model.weights.export import export_transformer, load_transformer
from model.weights.load import INDEX_NAME, WEIGHTS_NAME, load_weights, open_weights

CONFIG = TransformerConfig(**SMALL | {"num_key_value_heads": 2, "num_experts": 8, "capacity_factors": (1.0, 2.0, 3.0)})
SHARD_SIZE = 500_000


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A transformer directory as diffusers writes it: bf16, in several files with an index."""
    from diffusers.models.transformers.transformer_nucleusmoe_image import NucleusMoEImageTransformer2DModel

    torch.manual_seed(0)
    plain = NucleusTransformer(CONFIG)
    torch.nn.init.normal_(plain.proj_out.weight)
    path = tmp_path_factory.mktemp("released")
    export_transformer(plain, path / "one_file", dtype=torch.bfloat16)
    theirs = NucleusMoEImageTransformer2DModel.from_pretrained(path / "one_file", torch_dtype=torch.bfloat16)
    theirs.save_pretrained(path / "released", max_shard_size=SHARD_SIZE)
    assert len(list((path / "released").glob("*.safetensors"))) > 3
    return path / "released"


@pytest.fixture
def broken(released, tmp_path):
    return shutil.copytree(released, tmp_path / "broken")


def on_meta():
    with torch.device("meta"):
        return NucleusTransformer(CONFIG)


def stored(directory):
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_a_model_on_the_meta_device_gets_the_stored_values(released):
    filled = on_meta()
    total = sum(tensor.nbytes for tensor in stored(released).values())
    assert load_weights(filled, released) == total
    assert {p.dtype for p in filled.parameters()} == {torch.float32}
    for name, tensor in stored(released).items():
        assert torch.equal(filled.state_dict()[name], tensor.float()), name
    assert {p.dtype for p in load_transformer(released).parameters()} == {torch.bfloat16}


def test_an_export_of_a_load_is_the_same_files(released, tmp_path):
    """Files, index and bytes are those that diffusers wrote."""
    export_transformer(load_transformer(released), tmp_path, max_shard_size=SHARD_SIZE)
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == sorted(path.name for path in released.iterdir())
    for name in written:
        if name != "config.json":
            assert (tmp_path / name).read_bytes() == (released / name).read_bytes(), name


def test_diffusers_loads_an_export_in_several_files(released, tmp_path):
    from diffusers.models.transformers.transformer_nucleusmoe_image import NucleusMoEImageTransformer2DModel

    export_transformer(load_transformer(released), tmp_path, dtype=torch.float32, max_shard_size="700KB")
    assert (tmp_path / INDEX_NAME).is_file() and not (tmp_path / WEIGHTS_NAME).exists()
    theirs, report = NucleusMoEImageTransformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in stored(released).items():
        assert torch.equal(theirs.state_dict()[name], tensor.float()), name


def test_an_export_keeps_one_file_in_memory_at_a_time(released, tmp_path):
    weights, held = open_weights(released), []

    def read(name):
        assert sum(part.numel() for part in held) * 2 < SHARD_SIZE
        return weights.read(name)

    def save(tensors, file, metadata):
        held.append(file)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= SHARD_SIZE
        save_file(tensors, file, metadata)
        held.clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.weights.export, "save_file", save)
        export_transformer(weights._replace(read=weights.read), tmp_path, CONFIG, max_shard_size=SHARD_SIZE)


def shard(built, kind, world, rank=0):
    """The layouts of model.train.parallel.parallelize, made with plain FSDP2 and DTensor."""

    def mesh_of(**sizes):
        # Named by rank: PyTorch keeps equal meshes, and one process plays several ranks here.
        names = tuple(f"{name}_{rank}" for name in sizes)
        return init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=names)

    mesh = mesh_of(replicate=2, shard=world // 2) if kind == "hsdp" else mesh_of(shard=world)
    experts_mesh = None
    if kind in ("experts", "rows"):  # experts over 2 ranks; what each holds over the others, by experts or by rows
        experts_mesh = mesh_of(efsdp=world // 2, ep=2)
    for block in built.transformer_blocks:
        if experts_mesh is not None and block.moe_enabled:
            experts = block.img_mlp.experts
            for name, parameter in list(experts.named_parameters()):
                spread = distribute_tensor(parameter, experts_mesh[f"ep_{rank}"], [Shard(0)])
                setattr(experts, name, torch.nn.Parameter(spread))
            dim = 1 if kind == "rows" else 0
            fully_shard(experts, mesh=experts_mesh[f"efsdp_{rank}"], shard_placement_fn=lambda p: Shard(dim))
        fully_shard(block, mesh=mesh)
    fully_shard(built, mesh=mesh)
    return built


@pytest.mark.parametrize("kind", ["fsdp", "hsdp", "experts", "rows"])
def test_each_rank_reads_and_keeps_only_its_share(released, monkeypatch, kind):
    """Loading calls no collective, so that one process can act as each of four ranks in turn."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    world, whole = 4, stored(released)
    total = sum(tensor.nbytes for tensor in whole.values())
    pieces = []

    class Counting:
        def __init__(self, *args, **kwargs):
            self.file = safe_open(*args, **kwargs)

        def __enter__(self):
            self.reader = self.file.__enter__()
            return self

        def __exit__(self, *args):
            return self.file.__exit__(*args)

        def keys(self):
            return self.reader.keys()

        def get_tensor(self, name):
            pieces.append(self.reader.get_tensor(name).nbytes)
            return self.reader.get_tensor(name)

        def get_slice(self, name):
            stored_slice = self.reader.get_slice(name)

            class Slice:
                get_shape, get_dtype = stored_slice.get_shape, stored_slice.get_dtype

                def __getitem__(self, region):
                    pieces.append(stored_slice[region].nbytes)
                    return stored_slice[region]

            return Slice()

    safe_open = model.weights.load.safe_open
    monkeypatch.setattr(model.weights.load, "safe_open", Counting)
    shares = world // 2 if kind == "hsdp" else world
    for rank in range(world):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            pieces.clear()
            built = shard(on_meta(), kind, world, rank)
            assert load_weights(built, released) == sum(pieces)
            assert sum(pieces) < 1.05 * total / shares  # tensors with fewer rows than ranks are not cut evenly
            assert max(pieces) <= max(tensor.nbytes for tensor in whole.values()) / shares
            for name, tensor in built.state_dict().items():
                assert isinstance(tensor, DTensor) and not tensor.is_meta
                expected = share(kind, name, whole[name], rank)
                local = tensor.to_local()
                assert torch.equal(local, expected.float()) if expected is not None else not local.numel(), name
        finally:
            dist.destroy_process_group()


def share(kind, name, whole, rank):
    """The share of a tensor of `rank` of four, by plain chunks; None if it has no row."""
    if kind == "hsdp":
        return chunk(whole, 0, 2, rank % 2)
    if kind == "fsdp" or ".experts." not in name:
        return chunk(whole, 0, 4, rank)
    return chunk(chunk(whole, 0, 2, rank % 2), 1 if kind == "rows" else 0, 2, rank // 2)


def chunk(whole, dim, parts, index):
    pieces = whole.chunk(parts, dim)
    return pieces[index] if index < len(pieces) else None


def _rank(rank, released, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    built = shard(on_meta(), "fsdp", 2)
    load_weights(built, released)
    export_transformer(built, folder / "exported", CONFIG, dtype=torch.bfloat16, max_shard_size=SHARD_SIZE)
    inputs = torch.full((1, 16, 16), 0.5), (1, 4, 4), torch.full((1, 5, 24), 0.1), None, torch.tensor([0.3])
    with torch.no_grad():
        torch.save(built(*inputs), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_load_shards_and_export_the_same_files(released, tmp_path):
    torch.multiprocessing.spawn(_rank, (released, tmp_path), nprocs=2)
    for file in sorted(released.glob("*.safetensors*")):
        assert (tmp_path / "exported" / file.name).read_bytes() == file.read_bytes(), file.name
    plain = on_meta()
    load_weights(plain, released)
    inputs = torch.full((1, 16, 16), 0.5), (1, 4, 4), torch.full((1, 5, 24), 0.1), None, torch.tensor([0.3])
    with torch.no_grad():
        expected = plain(*inputs)
    for rank in range(2):
        actual = torch.load(tmp_path / f"{rank}.pt")  # with one thread: this process may add up in another order
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def edit_index(directory, change):
    path = directory / INDEX_NAME
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def first_file(directory):
    return sorted(directory.glob("*.safetensors"))[0]


def rewrite(directory, change):
    """Changes the tensors of the file that holds img_in.bias."""
    file = directory / json.loads((directory / INDEX_NAME).read_text())["weight_map"]["img_in.bias"]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    "breaking, message",
    [
        (lambda d: first_file(d).unlink(), "-00001-of-0000. *.*which is missing"),
        (
            lambda d: first_file(d).write_bytes(first_file(d).read_bytes()[:-7]),
            "00001-of-.* is not a complete safetensors file",
        ),
        (lambda d: first_file(d).write_bytes(b"\0" * 99), "00001-of-.* is not a complete safetensors file"),
        (lambda d: edit_index(d, lambda m: m.update(nonsense=first_file(d).name)), "index .* puts nonsense in .*00001"),
        (lambda d: edit_index(d, lambda m: m.pop("img_in.bias")), "holds img_in.bias, which its index puts in no file"),
        (lambda d: edit_index(d, lambda m: m.update({"img_in.bias": "../x.safetensors"})), "names '../x.safetensors'"),
        (lambda d: (d / INDEX_NAME).write_text("{"), "index.json is not an index"),
        (lambda d: (d / INDEX_NAME).write_text('{"weight_map": 3}'), "index.json is not an index"),
        (lambda d: rewrite(d, lambda t: t.pop("img_in.bias")), "puts img_in.bias in .* does not contain it"),
        (
            lambda d: rewrite(d, lambda t: t.update({"img_in.bias": torch.ones(3)})),
            r"img_in.bias has shape \(3,\), not",
        ),
        (
            lambda d: (rewrite(d, lambda t: t.pop("img_in.bias")), edit_index(d, lambda m: m.pop("img_in.bias"))),
            "missing img_in.bias",
        ),
        (
            lambda d: (
                rewrite(d, lambda t: t.update(extra=torch.ones(3))),
                edit_index(d, lambda m: m.update(extra=m["img_in.bias"])),
            ),
            "unknown extra",
        ),
        (lambda d: (d / INDEX_NAME).unlink(), "is not a checkpoint"),
    ],
    ids=range(13),
)
def test_what_is_wrong_is_named_before_anything_is_read(broken, breaking, message):
    breaking(broken)
    built = on_meta()
    with pytest.raises(ValueError, match=message):
        load_weights(built, broken)
    assert all(parameter.is_meta for parameter in built.parameters())


@pytest.mark.filterwarnings("ignore")
def test_a_dcp_checkpoint_exports_tensor_by_tensor(released, tmp_path):
    import torch.distributed.checkpoint as dcp

    plain = load_transformer(released)
    dcp.save({f"model.{n}": t for n, t in plain.state_dict().items()}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    export_transformer(open_weights(tmp_path / "dcp"), tmp_path / "out", CONFIG, max_shard_size=SHARD_SIZE)
    assert (tmp_path / "out" / INDEX_NAME).read_bytes() == (released / INDEX_NAME).read_bytes()
    assert all(torch.equal(tensor, stored(released)[name]) for name, tensor in stored(tmp_path / "out").items())

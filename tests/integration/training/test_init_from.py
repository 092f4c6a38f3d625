"""A first stage that starts from released weights."""

import pytest
import torch
from train_helpers import read_weights, train_config, training_stage, transformer_config, write_latents

from model.config import TrainConfig
from model.transformer import NucleusTransformer
from model.weights.export import export_transformer


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return write_latents(tmp_path_factory.mktemp("data") / "latents")


@pytest.fixture
def released(tmp_path):
    torch.manual_seed(7)
    model = NucleusTransformer(transformer_config(capacity_factors=1.0))
    export_transformer(model, tmp_path / "released", max_shard_size="50KB")
    return tmp_path / "released", model.state_dict()


def train(latents, folder, name, before=None, **changes):
    """One step that moves weights by 1e-30 at most."""
    from model.train.run import train_stage

    config = train_config(
        steps=1, optim={"muon_lr": 1e-30, "adamw_lr": 1e-30}, losses={}, checkpoint_every_steps=1, **changes
    )
    out = folder / name
    out.mkdir()
    train_stage(latents, training_stage(config), before, folder / f"work_{name}", out)
    return out, read_weights(out)[1]


def test_training_starts_from_them_unless_a_stage_comes_before(latents, released, tmp_path, capsys):
    directory, expected = released
    out, scratch = train(latents, tmp_path, "scratch")
    _, actual = train(latents, tmp_path, "from_released", init_from=str(directory), activation_checkpointing="full")
    assert actual.keys() == expected.keys()
    assert all(torch.allclose(actual[name], tensor, rtol=0, atol=1e-20) for name, tensor in expected.items())
    assert not torch.allclose(actual["img_in.weight"], scratch["img_in.weight"])
    output = capsys.readouterr().out
    assert f"begins with 1000 steps of warm-up, from the weights {directory} (without optimiser state)" in output
    _, actual = train(latents, tmp_path, "second_stage", before=out, init_from=str(directory), carry_optimizer=False)
    assert torch.allclose(actual["img_in.weight"], scratch["img_in.weight"], rtol=0, atol=1e-20)


def test_weights_of_another_model_are_refused(latents, tmp_path):
    other = NucleusTransformer(transformer_config(route_scale=1.0))
    export_transformer(other, tmp_path / "other")
    with pytest.raises(ValueError, match=r"another model: route_scale 1.0 there, 2.5 here"):
        train(latents, tmp_path, "out", init_from=str(tmp_path / "other"))


@pytest.mark.parametrize(
    "where, valid",
    [
        ("/models/released", True),
        ("NucleusAI/image/transformer@" + "a" * 40, True),
        ("NucleusAI/image@" + "1" * 40, True),
        ("NucleusAI/image@main", False),
        ("image@" + "1" * 40, False),
        ("NucleusAI/image@" + "1" * 39, False),
        ("", False),
    ],
)
def test_a_hub_repository_is_pinned_by_commit(where, valid):
    values = train_config().model_dump() | {"init_from": where}
    if valid:
        assert TrainConfig(**values).init_from == where
    else:
        with pytest.raises(ValueError, match="init_from=.* must be a directory, or ORG/REPO"):
            TrainConfig(**values)


def test_the_hub_gives_the_subfolder_of_the_commit(released, tmp_path, monkeypatch):
    import huggingface_hub

    from model.weights.export import released_weights

    directory, _ = released
    asked = {}

    def snapshot_download(repo_id, revision, allow_patterns):
        asked.update(repo_id=repo_id, revision=revision, allow_patterns=allow_patterns)
        (tmp_path / "snapshot").mkdir()
        (tmp_path / "snapshot" / "transformer").symlink_to(directory)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    result = released_weights(f"an/image/transformer@{'a' * 40}", transformer_config())
    assert result == tmp_path / "snapshot" / "transformer"
    assert asked == {"repo_id": "an/image", "revision": "a" * 40, "allow_patterns": ["transformer/*"]}

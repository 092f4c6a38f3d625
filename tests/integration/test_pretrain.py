"""The training alone, by the command that users type, beside the reproduction that it is a part of."""

from __future__ import annotations

import pytest

from tasks.manifest import load_manifest, verify


@pytest.mark.long
def test_what_a_reproduction_made_is_not_made_again(smoke, smoke_home):
    before = smoke_home.listing()
    done = smoke_home.run("--recipe", "smoke", workflow="pretrain")
    made = smoke_home.outputs(done, of="Pretrained")
    assert smoke_home.listing() == before and "step 1/" not in done.stdout
    assert made["merged"] == smoke["merged"] and made["curated"] == smoke["curated"]
    (checkpoints,) = load_manifest(made["merged"]).parents
    verify(made["components"])
    assert str(made["components"]) in [parent.uri for parent in load_manifest(checkpoints.path).parents]

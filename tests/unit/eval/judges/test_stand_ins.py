"""After the import of a judge's library, torchvision or timm does not seem to be installed."""

import importlib
import subprocess
import sys
from importlib.util import find_spec

import pytest

from eval.judges import stand_ins

CODE = """
import importlib.util, sys
import transformers.utils as utils
before = {name: importlib.util.find_spec(name) is not None for name in ("torchvision", "timm", "peft", "open_clip")}
from eval.judges.dreamsim import dreamsim_package
from eval.judges.mplug import mplug_package
for package in (mplug_package, dreamsim_package):
    with package() as module:
        assert module.torch
traces = [n for n in sys.modules if n.split(".")[0] in (*before, "modelscope", "dreamsim") and not before.get(n.split(".")[0])]
assert not traces, traces
after = {name: importlib.util.find_spec(name) is not None for name in before}
assert after == before
assert utils.is_torchvision_available() == before["torchvision"] and utils.is_timm_available() == before["timm"]
assert utils.is_peft_available() == before["peft"]
assert utils.logging.get_verbosity() == utils.logging.WARNING
assert not hasattr(sys.modules["transformers"].PreTrainedModel, "post_init_origin")  # modelscope's patch
"""


@pytest.mark.slow
def test_a_library_is_imported_without_a_trace():
    for library in ("modelscope", "dreamsim"):
        if find_spec(library) is None:
            pytest.skip(f"{library} is not installed (no-deps.txt)")
    subprocess.run([sys.executable, "-c", CODE], check=True)


def test_a_module_that_was_imported_before_is_there_again_even_after_an_error(tmp_path, monkeypatch):
    (tmp_path / "judge_library.py").write_text("import needed.part\nvalue = needed.part.value\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    real = stand_ins.module("needed")
    monkeypatch.setitem(sys.modules, "needed", real)
    parts = {"needed": stand_ins.module("needed"), "needed.part": stand_ins.module("needed.part", value=3)}
    with pytest.raises(KeyError), stand_ins.importable(parts, library="judge_library"):
        assert importlib.import_module("judge_library").value == 3
        raise KeyError
    assert sys.modules["needed"] is real and "needed.part" not in sys.modules and "judge_library" not in sys.modules


def test_a_torchvision_that_imports_is_used_and_one_that_does_not_is_replaced(tmp_path, monkeypatch):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("")
    for text, replaced in (("raise RuntimeError('operator torchvision::nms does not exist')", True), ("", False)):
        (tmp_path / "torchvision" / "transforms.py").write_text(text)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.syspath_prepend(str(tmp_path))
        importlib.invalidate_caches()
        assert bool(stand_ins.torchvision()) is replaced
        assert ("torchvision" in sys.modules) is not replaced
    for name in ("torchvision", "torchvision.transforms"):
        del sys.modules[name]  # not by monkeypatch, which would restore the stand-in for later tests


def test_the_stand_in_normalises_as_torchvision_does():
    """Its definition: sub and div by tensors of the pixels' type."""
    import torch

    pixels = torch.rand(2, 3, 5, 7)
    mean, std = (0.4, 0.5, 0.3), (0.2, 0.3, 0.25)
    expected = pixels.clone().sub_(torch.tensor(mean).view(-1, 1, 1)).div_(torch.tensor(std).view(-1, 1, 1))
    assert torch.equal(stand_ins.Normalize(mean, std)(pixels), expected)

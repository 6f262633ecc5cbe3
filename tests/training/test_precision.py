"""Training in bfloat16, and with compiled encoders: close to float32, the same, or refused at the start."""

import pytest
import torch
from torch._dynamo.utils import counters

from models import precision
from models.backbones import BACKBONES
from models.precision import InPrecision
from models.task import Task
from training.compiled import compile_shared
from training.config import TrainConfig
from training.errors import UserError
from training.footprint import Patch
from training.passion.objective import Coefficients
from training.passion.staged import staged
from training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

HALF = torch.full((4,), 0.5)
WEIGHTS = Coefficients(sep=torch.tensor([0.5, 0.5, 0.0, 0.5]), kl=HALF, proto=HALF)
"""One modality leads, so its separate path runs without gradients."""


def patch_of(backbone):
    side = 16 if backbone in {"rfnet", "unet"} else 32
    torch.manual_seed(3)
    patch = Patch(backbone, Task.load("glioma").model_copy(update={"patch_size": (side,) * 3}), 8, "cpu")
    patch.network.eval()
    return patch


def step(patch, network, mask):
    """The total, and all gradients in one vector."""
    parameters = list(patch.network.parameters())
    losses, found = staged(network, parameters, patch.x, patch.labels, [mask], patch.classes, lambda _losses: WEIGHTS)
    assert {losses.fuse.dtype, losses.kl.dtype, *(g.dtype for g in found.values())} == {torch.float32}
    return losses.weighted(WEIGHTS), torch.cat([g.flatten() for g in found.values()])


@pytest.mark.parametrize("layout", [torch.channels_last_3d, torch.contiguous_format], ids=["last", "first"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_bfloat16_is_close_to_float32_and_losses_stay_float32(backbone, layout):
    patch = patch_of(backbone)
    patch.x = patch.x.contiguous(memory_format=layout)
    mask = (True, False, True, True)
    total, gradients = step(patch, patch.network, mask)
    reduced = InPrecision(patch.network, "bfloat16")
    assert reduced.encode(patch.x, mask)[0][0].dtype == torch.bfloat16
    total_16, gradients_16 = step(patch, reduced, mask)
    torch.testing.assert_close(total_16, total, rtol=0.01, atol=0)
    assert not torch.equal(total_16, total)
    # A training step's gradients are that noisy in bfloat16: eight bits, and InstanceNorm over few voxels.
    assert torch.cosine_similarity(gradients_16, gradients, dim=0) > 0.7


@pytest.mark.parametrize("backbone", ["unet", "mmformer"])
def test_compiled_encoders_are_the_same_graphs_for_all_subsets_and_compute_the_same(backbone):
    patch = patch_of(backbone)
    subsets = [(True, False, True, False), (False, True, False, True)]
    wanted = [step(patch, patch.network, mask) for mask in subsets]
    compile_shared(patch.network, backend="eager")
    torch._dynamo.reset()
    counters.clear()
    for mask, (total, gradients) in zip(subsets, wanted, strict=True):
        compiled_total, compiled_gradients = step(patch, patch.network, mask)
        torch.testing.assert_close(compiled_total, total)
        assert (compiled_gradients - gradients).norm() < 1e-4 * gradients.norm()
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]


def config(small_data, out, **changes):
    data, split = small_data
    return TrainConfig(data=data, split=split, out=out, epochs=1, device="cpu", **changes)


def test_a_run_in_bfloat16_says_so_on_its_card(small_data, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "_has_bfloat16", lambda _device: True)  # else it is only slow
    trainer = Trainer(config(small_data, tmp_path, precision="bfloat16"))
    assert trainer.run()
    assert trainer.card().training["config"]["precision"] == "bfloat16"
    assert {p.dtype for p in trainer.network.parameters()} == {torch.float32}


def test_what_the_machine_lacks_is_refused_at_the_start(small_data, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "_has_bfloat16", lambda _device: False)
    with pytest.raises(UserError, match="the device 'cpu' has no bfloat16 arithmetic: use precision float32"):
        Trainer(config(small_data, tmp_path, precision="bfloat16"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"there is no C\+\+ compiler here"):
        Trainer(config(small_data, tmp_path, compile=True))
    assert not any(tmp_path.iterdir())

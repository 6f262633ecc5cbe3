"""Windows: those of MONAI, averaged as MONAI does."""

import pytest
import torch
from monai.inferers import sliding_window_inference

from models.windows import Windows


@pytest.mark.parametrize("overlap", [0, 0.25, 0.5, 0.7])
@pytest.mark.parametrize("shape", [(16, 16, 16), (17, 40, 25), (33, 24, 31)])
def test_windows_and_their_mean_are_monais(shape, overlap):
    size = (16, 16, 8)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    seen = []

    def found(patches):
        seen.extend(patches)
        ramp = torch.linspace(0, 1, 16)[:, None, None]  # what is found depends on the place in the window
        return torch.stack([patches[:, 0] * ramp, patches[:, 1] + ramp, patches.mean(1).exp()], dim=1)

    windows = Windows(shape, size, overlap)
    ours = windows.mean(found, x, 3)
    own, seen = seen, []
    monais = sliding_window_inference(x[None], size, 1, found, overlap=overlap, mode="constant")[0]
    assert len(own) == len(windows)
    assert all(torch.equal(a, b) for a, b in zip(own, seen, strict=True))
    torch.testing.assert_close(ours, monais, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(windows.mean(found, x, 3, batch=5), ours, rtol=1e-6, atol=1e-6)


def test_windows_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="smaller than a window"):
        Windows((15, 16, 16), (16, 16, 16), 0.5)
    with pytest.raises(ValueError, match=r"not in \[0, 1\)"):
        Windows((16, 16, 16), (16, 16, 16), 1)

"""What `auto` means as a device, told without torch where that can be."""

from __future__ import annotations

import sys
from pathlib import Path

GPU_FILES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""Device files without which a process on Linux reaches no GPU: NVIDIA's, that of WSL, AMD's."""


def automatic_device() -> str:
    """`cpu`, or `cuda (name of the GPU)`. Torch is asked, and so imported, only where there may be a GPU."""
    if sys.platform == "darwin" or (sys.platform == "linux" and not any(Path(f).exists() for f in GPU_FILES)):
        return "cpu"
    from training.device import choose_device, device_name

    device = choose_device("auto")
    return f"{device} ({device_name(device)})" if device.type == "cuda" else "cpu"

"""The PASSION training step and inference window written straight from the formulas: the baseline of benchmarks.

It is FROZEN. Nothing here is optimised and nothing of ours is imported, so that figures measured against it stay
comparable over time: any change of this package makes the old figures incomparable. A test holds it to the golden
figures, which is what makes it an honest baseline; its weights are interchangeable with those of `models.backbones`.
"""

from __future__ import annotations

from .m2ftrans import M2FTrans
from .mmformer import MMFormer
from .rfnet import RFNet
from .step import segment_window, total_loss

NETWORKS = {"rfnet": RFNet, "mmformer": MMFormer, "m2ftrans": M2FTrans}
"""Each is built with (modalities, classes, patch_size, width=8)."""

__all__ = ["NETWORKS", "segment_window", "total_loss"]

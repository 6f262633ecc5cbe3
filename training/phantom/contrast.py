"""The four contrasts: what each tissue looks like in each, and what a scanner adds to it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Floats = npt.NDArray[np.float32]

TISSUES = ("csf", "grey", "white", "necrosis", "oedema", "enhancing")
CONTRASTS = ("flair", "t1ce", "t1", "t2")

# Relative brightness per tissue. What the table says about visibility: the rim stands out in T1ce alone; oedema stands
# out in FLAIR, is close to CSF in T2 and close to grey matter in the T1 pair; necrosis is dark in the T1 pair only.
BRIGHTNESS: dict[str, tuple[float, ...]] = {
    #         csf   grey  white necr. oedema enh.
    "flair": (0.18, 0.62, 0.50, 0.60, 1.00, 0.84),
    "t1ce": (0.26, 0.64, 0.84, 0.36, 0.56, 1.28),
    "t1": (0.24, 0.63, 0.84, 0.42, 0.54, 0.55),
    "t2": (1.06, 0.62, 0.45, 0.94, 0.87, 0.80),
}
# Log-normal spread between patients, per tissue as above; the necrotic core is the least alike.
_SPREAD = (0.06, 0.035, 0.035, 0.13, 0.045, 0.08)
_TEXTURE = (0.02, 0.03, 0.02, 0.11, 0.07, 0.11)
"""Relative heterogeneity within a tissue."""
_VESSEL = {"t1ce": 0.75}
_HYPERINTENSITY = {"flair": 0.34, "t2": 0.22, "t1": -0.10, "t1ce": -0.10}


@dataclass(frozen=True)
class Scene:
    """What is to be imaged, per brain voxel (N): fractions of the six tissues, and features nobody labels."""

    fractions: Floats
    """(6, N), summing to 1."""
    texture: Floats
    vessels: Floats
    hyperintensities: Floats


@dataclass(frozen=True)
class Scan:
    """One contrast's own draw: brightness per tissue, scale, slice thickness, bias strength, noise."""

    name: str
    brightness: Floats
    gain: float
    slice_axis: int
    slice_blur: float
    """mm, standard deviation of the slice profile."""
    bias: float
    noise: float

    @classmethod
    def draw(cls, rng: np.random.Generator, name: str) -> Scan:
        """Parameters of one acquisition; the same number of draws for every contrast."""
        brightness = np.array(BRIGHTNESS[name]) * np.exp(rng.normal(0, _SPREAD))
        return cls(
            name=name,
            brightness=brightness.astype(np.float32),
            gain=float(rng.lognormal(np.log(520), 0.45)),
            slice_axis=int(rng.choice([0, 1, 2], p=[0.15, 0.1, 0.75])),
            slice_blur=float(rng.choice([0.0, 0.6, 1.1], p=[0.4, 0.3, 0.3])),
            bias=float(rng.uniform(0.03, 0.10)),
            noise=float(rng.uniform(0.018, 0.038)),
        )

    def acquire(
        self,
        rng: np.random.Generator,
        scene: Scene,
        brain: npt.NDArray[np.bool_],
        bias: Floats,
        spacing: float,
    ) -> npt.NDArray[np.uint16]:
        """The image over the box `brain` (X, Y, Z) covers: 0 outside the brain and at least 1 inside.

        `bias` is a smooth field of unit variance over the brain's voxels (N).
        """
        signal = np.zeros(scene.texture.shape, np.float32)
        for fraction, level, texture in zip(scene.fractions, self.brightness, _TEXTURE, strict=True):
            signal += fraction * (level * (1 + np.float32(texture) * scene.texture))
        signal += np.float32(_VESSEL.get(self.name, 0)) * scene.vessels
        signal += np.float32(_HYPERINTENSITY[self.name]) * scene.hyperintensities
        if self.slice_blur > 0:
            signal = self._blur(signal, brain, self.slice_blur / spacing)
        signal *= np.exp(np.float32(self.bias) * bias)
        # Rician: the magnitude of a complex signal with Gaussian noise in both channels.
        noise = rng.standard_normal((2, signal.size), dtype=np.float32) * np.float32(self.noise)
        signal = np.hypot(np.maximum(signal, 0) + noise[0], noise[1])
        image = np.zeros(brain.shape, np.uint16)
        image[brain] = np.clip(np.rint(signal * np.float32(self.gain)), 1, 65535).astype(np.uint16)
        return image

    def _blur(self, signal: Floats, brain: npt.NDArray[np.bool_], sigma: float) -> Floats:
        # Divided by the blurred mask: a skull-stripped scan does not fade towards its edge.
        volume = np.zeros(brain.shape, np.float32)
        volume[brain] = signal
        weight = brain.astype(np.float32)
        blurred = [ndimage.gaussian_filter1d(v, sigma, self.slice_axis, truncate=3.0)[brain] for v in (volume, weight)]
        divided: Floats = blurred[0] / blurred[1]
        return divided

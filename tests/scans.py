"""Small NIfTI files, good and bad, for tests of the service."""

import gzip
import io
from pathlib import Path

import nibabel as nib
import numpy as np

SHAPE = (40, 40, 32)
SMALL = (28, 28, 24)
"""For tests that segment: few windows, and still more than one along each axis."""
UNIT = np.diag([1.0, 1.0, 1.0, 1.0])


def head(modality, shape=SHAPE, seed=0):
    """float32 (X, Y, Z): a noisy ball in empty space with a bright spot; each modality its own."""
    rng = np.random.default_rng([seed, sum(modality.encode())])
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
    brain = (grid**2).sum(0) < 0.8
    spot = ((grid - 0.2) ** 2).sum(0) < 0.08
    data = brain * (100 + 10 * rng.standard_normal(shape)) + spot * (20 + 10 * len(modality))
    return data.clip(0).astype(np.float32)


def image(data, affine=UNIT, sform=2, qform=1, kind=nib.Nifti1Image):
    img = kind(data, affine)
    img.set_sform(affine, sform)
    img.set_qform(affine, qform)
    return img


def nifti(img):
    """The image as the bytes of a .nii file."""
    return img.to_bytes()


def nifti_gz(img):
    return gzip.compress(nifti(img), 1, mtime=0)


def scan(modality="flair", shape=SHAPE, **changes):
    """The bytes of a good .nii.gz file."""
    return nifti_gz(image(head(modality, shape), **changes))


def edited(data: bytes, kind=nib.Nifti1Header, **fields) -> bytes:
    """The bytes of a .nii file with header fields changed behind nibabel's back."""
    header = kind.from_fileobj(io.BytesIO(data), check=False)
    for name, value in fields.items():
        header[name] = value
    return header.binaryblock + data[header.sizeof_hdr :]


def write(folder: Path, modalities, **changes) -> dict[str, Path]:
    """Good files by modality."""
    files = {}
    for name in modalities:
        files[name] = folder / f"{name}.nii.gz"
        files[name].write_bytes(scan(name, **changes))
    return files


def read(data: bytes):
    """A nibabel image from the bytes of a .nii.gz file."""
    return nib.Nifti1Image.from_bytes(gzip.decompress(data))

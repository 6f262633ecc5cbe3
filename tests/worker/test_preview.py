"""The picture: colours where the mask is, sides where the letters say, small, and always the same."""

import io

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from scans import image

from models.predictor import Segmentation
from models.task import Task
from models.volume import Grid, Volume
from worker.preview import COLOURS, FOOT, GREYS, ROOM, SIDE, Backdrop, draw, save_preview

GLIOMA = Task.load("glioma")
SHAPE = (40, 48, 32)


def case(axes="RAS", zooms=(1.0, 1.0, 1.0), tumour=True, noise=0):
    """A head whose patient's right is brighter, and a tumour in the right, front, upper corner."""
    data = np.zeros(SHAPE, np.float32)
    data[4:36, 4:44, 3:29] = 100
    data[20:36, 4:44, 3:29] = 300
    data += noise * np.random.default_rng(0).uniform(0, 1, SHAPE).astype(np.float32)
    classes = np.zeros(SHAPE, np.uint8)
    if tumour:
        classes[24:34, 30:42, 23:25] = 2
        classes[26:32, 32:40, 21:27] = 1
        classes[28:31, 34:38, 22:26] = 3
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axes))
    affine = np.diag([*zooms, 1.0])
    scan, mask = (nib.Nifti1Image(v, affine).as_reoriented(turn) for v in (data, classes))
    volume = Volume(np.asarray(scan.dataobj, np.float32), Grid.of(image(np.asarray(scan.dataobj), scan.affine)))
    return Backdrop.of("flair", volume), Segmentation(np.asarray(mask.dataobj), volume.grid, GLIOMA)


def panels(picture):
    pixels = np.asarray(picture)
    assert pixels.shape == (SIDE + FOOT, 3 * SIDE)
    return [pixels[:SIDE, n * SIDE : (n + 1) * SIDE] for n in range(3)]


def centre(where):
    """Across and down, as shares of a panel."""
    return np.argwhere(where).mean(0)[::-1] / SIDE


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SAR", "PIL"])
def test_sides_whatever_the_axes_of_the_file(axes):
    axial, coronal, sagittal = panels(draw(*case(axes)))
    for panel in (axial, coronal, sagittal):
        assert (centre(panel >= GREYS) < 0.45).all(), "right, front and above lie left or above"
    for panel in (axial, coronal):
        grey = np.where(panel < GREYS, panel, 0).astype(int)
        assert grey[:, : SIDE // 2].sum() > 2 * grey[:, SIDE // 2 :].sum(), "the bright right half is on the left"


def test_regions_have_their_colours_and_the_smaller_lies_on_the_larger():
    backdrop, segmentation = case()
    rgb = np.asarray(draw(backdrop, segmentation).convert("RGB"))[:SIDE, :SIDE].astype(int)
    for colour in COLOURS[:3]:
        assert (rgb == colour).all(-1).any()
    assert not (rgb == COLOURS[3]).all(-1).any()
    coloured = np.ptp(rgb, axis=-1) > 20
    scale = ROOM / 40
    # 10 x 12 voxels of the tumour in the axial slice, in a head of 32 x 40.
    assert coloured.sum() == pytest.approx(10 * 12 * scale**2, rel=0.1)
    ys, xs = np.nonzero(coloured)
    top = (SIDE - 40 * scale) / 2
    left = (SIDE - 32 * scale) / 2
    assert (xs.min(), xs.max()) == pytest.approx((left + 2 * scale, left + 12 * scale), abs=2)
    assert (ys.min(), ys.max()) == pytest.approx((top + 2 * scale, top + 14 * scale), abs=2)


def test_pixels_are_square_millimetres():
    axial, coronal, _ = panels(draw(*case(zooms=(1.0, 1.0, 4.0))))
    height, width = (np.ptp(np.nonzero(coronal[18:-18, 18:-18])[axis]) for axis in (0, 1))
    assert height / width == pytest.approx(26 * 4 / 32, rel=0.1)
    assert np.ptp(np.nonzero(axial[18:-18, 18:-18])[1]) == pytest.approx(32 / (26 * 4) * ROOM, abs=4)


def test_without_a_tumour_the_middle_and_no_colours():
    picture = draw(*case(tumour=False))
    assert all((panel < GREYS).all() and panel.any() for panel in panels(picture))
    assert picture.tobytes() != draw(*case()).tobytes()


def test_the_file_is_small_and_always_the_same(tmp_path):
    backdrop, segmentation = case(noise=300)
    for name in "ab":
        save_preview(backdrop, segmentation, tmp_path / name)
    data = (tmp_path / "a").read_bytes()
    assert data == (tmp_path / "b").read_bytes()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a", "b"]
    with Image.open(io.BytesIO(data)) as read:
        read.load()
        assert (read.format, read.size, read.info.keys() & {"exif", "date:create"}) == (
            "PNG",
            (3 * SIDE, SIDE + FOOT),
            set(),
        )
    worst = np.random.default_rng(0).integers(0, 256, (SIDE + FOOT, 3 * SIDE), np.uint8)
    incompressible = io.BytesIO()
    Image.fromarray(worst).save(incompressible, "PNG")
    assert len(data) < len(incompressible.getvalue()) < 300_000


def test_an_image_that_is_not_on_the_masks_grid_is_refused():
    backdrop, segmentation = case()
    with pytest.raises(ValueError, match="grid"):
        draw(Backdrop("flair", backdrop.grey[1:]), segmentation)


def test_images_with_no_or_thin_extent():
    flat = np.zeros((40, 40, 2), np.float32)
    flat[5:30, 5:30] = -7.5
    volume = Volume(flat, Grid.of(image(flat, np.diag([1.0, 1.0, 20.0, 1.0]))))
    draw(Backdrop.of("t1", volume), Segmentation(np.zeros(flat.shape, np.uint8), volume.grid, GLIOMA))
    nothing = Volume(np.zeros_like(flat), volume.grid)
    draw(Backdrop.of("t1", nothing), Segmentation(np.zeros(flat.shape, np.uint8), volume.grid, GLIOMA))

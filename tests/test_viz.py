"""Pictures: colours that can be told apart, nothing cut off, every size and mode of picture."""
import numpy as np
import pytest
from PIL import Image, ImageCms

import data
import toy
import viz
from conftest import ROOT
from losses import IGNORE


@pytest.mark.parametrize("names, apart", [
    (toy.NAMES, 10), (data.read_names(ROOT / "classes/voc-20.txt"), 10), (data.read_names(ROOT / "classes/coco-stuff.txt"), 3)])
def test_colours_can_be_told_apart(names, apart):
    """In CIELAB, where 2.3 is just noticeable; and from black, which is void."""
    rgb = np.array([viz.VOID, *viz.colours(tuple(names)).values()], np.uint8)
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    lab = np.asarray(ImageCms.applyTransform(Image.fromarray(rgb[None]), to_lab), float)[0]
    lab = np.stack([lab[:, 0] * 100 / 255, (lab[:, 1] + 128) % 256, (lab[:, 2] + 128) % 256], -1)
    distance = np.sqrt(((lab[:, None] - lab) ** 2).sum(-1)) + 1e9 * np.eye(len(lab))
    assert distance.min() > apart and len(rgb) == len(names) + 1


def test_a_name_keeps_its_colour():
    few, many = ("cat", "sofa", "wooden floor"), ("sofa", "wooden floor", "zebra", "cat")
    assert viz.colours(few) == {n: c for n, c in viz.colours(many).items() if n != "zebra"}
    painted = np.asarray(viz.paint(np.array([[0, 1], [IGNORE, 2]]), few))
    assert tuple(painted[0, 1]) == viz.colours(few)["sofa"] and tuple(painted[1, 0]) == viz.VOID


def test_present_names_areas_largest_first():
    labels = np.array([[2, 2, 2, 0], [2, 2, 0, IGNORE]])
    entries = viz.present(["a", "b", "c\nd"], labels, shares=True)
    assert [text for text, _ in entries] == ["71.4 % c d", "28.6 % a"]
    assert entries[0][1] == viz.colours(("a", "b", "c\nd"))["c\nd"]


@pytest.mark.parametrize("width", [60, 200, 900])
def test_a_legend_cuts_nothing_off(width):
    """The outermost pixels stay white whatever the names; names wider than the strip end in an ellipsis."""
    strip = np.asarray(viz.legend([(n, (9, 99, 9)) for n in ("cat", "a name " * 12, "дом", "sofa", "x" * 300)], width))
    assert strip.shape[1] == width
    for edge in (strip[0], strip[-1], strip[:, 0], strip[:, -1]):
        assert (edge == 255).all()
    boxes = (strip == (9, 99, 9)).all(-1)
    assert boxes.sum() >= 5 * 13 ** 2                                                      # all five are there


@pytest.mark.parametrize("size", [(100, 80), (1, 1), (3, 700), (1200, 900)])
def test_a_segmentation_is_readable_at_any_size(size):
    labels = np.zeros(size[::-1], np.int64)
    labels[:, size[0] // 2:] = 1
    sheet = viz.segmentation(Image.new("RGB", size, "gray"), labels, ["left", "right"])
    scale = max(1, -(-480 // size[0]))
    assert sheet.width == size[0] * scale >= 480 and sheet.height > size[1] * scale
    left, right = np.asarray(sheet)[0, 0].astype(int), np.asarray(sheet)[0, -1].astype(int)
    wanted = [0.45 * 128 + 0.55 * np.array(viz.colours(("left", "right"))[n]) for n in ("left", "right")]
    assert abs(right - wanted[1]).max() <= 2 and (size[0] == 1 or abs(left - wanted[0]).max() <= 2)


def test_curves_of_a_run_that_has_just_begun(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "total_loss": 1, "segmentation_loss": 1, "spd_loss": 0, "cpa_loss": 0, "reference_share": 0.5}\n')
    viz.curves(tmp_path / "log.jsonl", tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").width > 1000

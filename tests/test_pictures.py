"""Pictures: colours that can be told apart, nothing cut off, every size and mode of picture."""

import json
import re

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image, ImageCms

from losses import IGNORE
from sources import toy
from sources.benchmarks import CLASSES
from sources.registry import read_names
from support import pictures
from support.runs import read_log


@pytest.fixture
def figures(monkeypatch):
    """The matplotlib figures that are saved, in order."""
    saved = []
    save = Figure.savefig

    def keep(figure, *arguments, **options):
        save(figure, *arguments, **options)
        saved.append(figure)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


@pytest.mark.parametrize("names, apart", [("toy", 10), ("voc-20.txt", 10), ("coco-stuff.txt", 3)])
def test_colours_can_be_told_apart(names, apart):
    """In CIELAB, where 2.3 is just noticeable; and from black, which is void."""
    names = toy.NAMES if names == "toy" else read_names(CLASSES / names)
    rgb = pictures.colours(tuple(names))
    assert rgb.dtype == np.uint8 and not rgb[IGNORE].any()
    srgb, lab = (ImageCms.createProfile(space) for space in ("sRGB", "LAB"))
    to_lab = ImageCms.buildTransform(srgb, lab, "RGB", "LAB")
    lab = np.asarray(ImageCms.applyTransform(Image.fromarray(rgb[None]), to_lab), float)[0]
    light, a, b = lab.T
    lab = np.stack([light * 100 / 255, (a + 128) % 256, (b + 128) % 256], -1)
    distance = np.sqrt(((lab[:, None] - lab) ** 2).sum(-1)) + 1e9 * np.eye(len(lab))
    assert distance.min() > apart and len(rgb) == len(names) + 1


def test_a_name_keeps_its_colour():
    few, many = ("cat", "sofa", "wooden floor"), ("sofa", "wooden floor", "zebra", "cat")
    colours = pictures.colours(few)
    assert (colours[[1, 2, 0]] == pictures.colours(many)[[0, 1, 3]]).all()
    assert colours[0].tolist() == pictures.colours(("cat", "dog"))[0].tolist() == [233, 34, 119]
    painted = np.asarray(pictures.paint(np.array([[0, 1], [IGNORE, 2]]), few))
    assert (painted[[0, 0, 1], [0, 1, 1]] == colours[:3]).all() and not painted[1, 0].any()


def test_a_legend_names_areas_largest_first():
    labels = np.array([[2, 2, 2, 0], [2, 2, 0, IGNORE]])
    names = ("a", "b", "c\nd")
    entries = pictures.legend_entries(names, labels, shares=True)
    assert [text for text, _ in entries] == ["71.4 % c d", "28.6 % a"]
    assert entries[0][1] == tuple(pictures.colours(names)[2])
    assert [text for text, _ in pictures.legend_entries(names, labels, labels)] == ["c d", "a"]
    assert pictures.legend_entries(names, np.full((2, 2), IGNORE), shares=True) == []


def test_a_legend_cuts_nothing_off():
    """The outermost pixels stay white; long names end in an ellipsis."""
    labels = np.arange(5).repeat(20).reshape(10, 10)
    names = ("cat", "a name " * 12, "дом", "$ and $", "W" * 300)
    entries = pictures.legend_entries(names, labels, shares=True)
    assert max(len(text) for text, _ in entries) <= 48 and entries[1][0].endswith(" a…")
    wide = [("W" * 40, (9, 99, 9)), *((text, (9, 99, 9)) for text, _ in entries)]
    for cell in ((60, 60), (192, 192), (4000, 20)):
        sheet = np.asarray(pictures.grid([], [[Image.new("RGB", (9, 9))]], wide, cell))
        for edge in (sheet[0], sheet[-1], sheet[:, 0], sheet[:, -1]):
            assert (edge == 255).all()
        assert (sheet == (9, 99, 9)).all(-1).sum() >= 6 * 12**2  # all six boxes are there


@pytest.mark.parametrize(
    "size, drawn",
    [
        ((100, 80), (480, 384)),
        ((1, 1), (480, 480)),
        ((1200, 900), (1200, 900)),
        ((1000, 4000), (1000, 4000)),
        ((3, 700), (6, 1440)),
        ((1, 3000), (1, 3000)),
        ((3000, 1), (3000, 1)),
        ((1, 90_000), (1, 7500)),
        ((90_000, 30), (7500, 3)),
        ((15_999, 3), (8000, 2)),
    ],
)
def test_a_segmentation_is_readable_at_any_size(size, drawn):
    """Enlarged where it is small, yet never a sheet of gigabytes for a strip of pixels."""
    width, height = size
    labels = np.zeros((height, width), np.int64)
    labels[:, width // 2 :] = 1
    names = ("left", "right")
    sheet = np.asarray(pictures.segmentation(Image.new("RGB", size, "gray"), labels, names))
    assert sheet.shape[1] == max(640, drawn[0] + 16)
    assert drawn[1] < sheet.shape[0] <= drawn[1] + 60 + drawn[0] // 20
    assert (sheet[8 : 8 + drawn[1], 8 + drawn[0] :] == 255).all()
    left, right = (0.45 * 128 + 0.55 * colour for colour in pictures.colours(names)[:2].astype(int))
    assert abs(sheet[8, 7 + drawn[0]] - right).max() <= 2
    assert width < 10 or abs(sheet[8, 8] - left).max() <= 2


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (1, 1), (500, 375)])
def test_a_sheet_stays_a_sheet_whatever_its_pictures(size):
    labels = np.zeros(size[::-1], np.int64)
    sheet = pictures.comparison(Image.new("RGB", size), labels, labels, ["thing"])
    assert sheet.width == 3 * 488 + 8 and sheet.height < 1600
    if size == (500, 375):
        assert sheet.height == 3 * 18 + 360 + 8 + 27


def test_outlines_and_void():
    labels = np.zeros((40, 60), np.int64)
    labels[:, 30:] = 1
    labels[:3] = IGNORE
    sheet = np.asarray(pictures.overlay(Image.new("RGB", (60, 40), "gray"), labels, ("a", "b")))
    white = (sheet == 255).all(-1)
    assert white[3:, 29].all() and white[2].all() and white.sum() == 37 + 60
    assert abs(sheet[0, 0] - 0.45 * 128).max() <= 1


def test_highlight_dims_the_rest():
    image = Image.new("RGB", (8, 4), "black")
    bright = np.asarray(pictures.highlight(image, np.array([[True, False]])))[..., 0]
    assert (bright[:, :4] == 0).all() and (bright[:, 4:] > 200).all()


# Plots


def curves_in(figure):
    return {ax.get_title(): [line.get_label() for line in ax.get_lines()] for ax in figure.axes}


STEP = dict(step=1, total_loss=1, segmentation_loss=1, spd_loss=0, cpa_loss=0, reference_share=0.5)


def test_curves_of_a_run_that_has_just_begun(tmp_path, figures):
    path = tmp_path / "curves.png"
    pictures.curves([STEP], path)
    assert Image.open(path).width > 900
    assert curves_in(figures[0]) == {
        "losses": ["segmentation_loss", "spd_loss", "cpa_loss"],
        "reference patches": ["reference_share"],
    }


def test_curves_of_plain_fine_tuning(tmp_path, figures):
    """It logs nothing of distillation; and a score may have no value."""
    log = tmp_path / "log.jsonl"
    lines = [
        dict(step=1, total_loss=1, segmentation_loss=1),
        dict(step=1, mIoU_ground_truth=3, seen=5, unseen=None, harmonic=None),
        dict(step=2, total_loss=1, segmentation_loss=0.5),
        dict(step=2, mIoU_ground_truth=3, seen=6, unseen=1, harmonic=2),
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    log.write_text(text + '{"step": 3, "total')  # the power went
    pictures.curves(read_log(log), tmp_path / "curves.png")
    found = {"losses": ["segmentation_loss"], "evaluation": ["seen", "unseen", "harmonic"]}
    assert curves_in(figures[0]) == found
    assert figures[0].axes[0].get_lines()[0].get_xydata().tolist() == [[1, 1], [2, 0.5]]
    assert figures[0].axes[1].get_lines()[1].get_xydata().tolist() == [[2, 1]]


def test_curves_of_a_run_without_unseen_classes(tmp_path, figures):
    pictures.curves([STEP, dict(step=1, mIoU_ground_truth=30)], tmp_path / "curves.png")
    assert curves_in(figures[0])["evaluation"] == ["mIoU_ground_truth"]


def test_curves_of_nothing(tmp_path):
    pictures.curves([], tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").width > 1000


@pytest.mark.parametrize("x", [[-1e-17, 0.0], [-2e-8, 3e-9], [-0.0], [-1e-3, 2e-3, -1e-12]])
def test_no_tick_says_minus_nothing(tmp_path, figures, x):
    pictures.save_plot(tmp_path / "plot.png", [("", "", "", [("", x, x, "o")])])
    (ax,) = figures[0].axes
    texts = [text.get_text() for text in (*ax.get_xticklabels(), *ax.get_yticklabels())]
    assert texts and not [text for text in texts if re.fullmatch(r"[-−]0(\.0*)?", text)]


def test_trade_off_is_means_and_errors_without_what_worlds_differ_by(tmp_path, figures):
    values = np.random.default_rng(0).normal(40, 5, (5, 2, 3))  # [rows,2,seeds]
    names = ["untrained CLIP", "plain, 0.1", "plain, 1", "RPMD, 0.1", "RPMD, 1"]
    summaries = []
    for name, (seen, unseen) in zip(names, values):
        summaries.append({"row": name, "seen": {"each": seen}, "unseen": {"each": unseen}})
    pictures.trade_off(tmp_path / "plot.png", summaries)
    (ax,) = figures[0].axes
    assert [text.get_text() for text in ax.texts] == ["", "0.1", "1", "0.1", "1"]
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["untrained CLIP", "plain", "RPMD"]
    level, row = values.mean(0), 0
    for container in ax.containers:
        line, _, (across, up) = container
        for r, point in enumerate(line.get_xydata()):
            error = (values[row] - level).std(1, ddof=1) / 3**0.5
            mean = values[row].mean(1)
            np.testing.assert_allclose(point, mean)
            for bars, axis in ((across, 0), (up, 1)):
                low, high = np.array(bars.get_segments()[r])[:, axis]
                np.testing.assert_allclose([low, high], mean[axis] + [-error[axis], error[axis]])
            row += 1
    assert row == 5

"""Pictures: colours that can be told apart, legends that say enough, every size of picture."""
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from losses import IGNORE
from support import pictures


@pytest.fixture
def figures(monkeypatch):
    """The matplotlib figures that are saved."""
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **options: saved.append(figure))
    return saved


def test_colours_can_be_told_apart():
    """Also from white lines, and from black: no label. No two of 847 are the same."""
    colours = np.vstack([[(0, 0, 0), (255, 255, 255)], pictures.PALETTE[:847]]).astype(float)
    distance = np.linalg.norm(colours[:, None] - colours, axis=-1) + 1e9 * np.eye(len(colours))
    for count, apart in ((20, 45), (52, 45), (847, 10)):
        assert distance[:count + 2, :count + 2].min() > apart
    assert not pictures.PALETTE[IGNORE].any()


def test_labels_are_painted_in_their_colours():
    labels = np.array([[0, 1], [IGNORE, 2000]])
    painted = np.asarray(pictures.paint(labels))
    assert (painted == pictures.PALETTE[[[0, 1], [-1, 2000 % 1024]]]).all()
    labels = np.zeros((40, 60), np.int64)
    labels[:, 30:] = 1
    labels[:3] = IGNORE
    drawn = np.asarray(pictures.overlay(Image.new("RGB", (60, 40), "gray"), labels))
    white = (drawn == 255).all(-1)
    assert white[3:, 29].all() and white[2].all() and white.sum() == 37 + 60  # the lines between
    assert abs(drawn[9, 9] - 0.4 * 128 - 0.6 * pictures.PALETTE[0]).max() <= 1
    black, mask = Image.new("RGB", (8, 4), "black"), np.array([[True, False]])
    kept = np.asarray(pictures.highlight(black, mask))
    assert (kept[:, :4] == 0).all() and (kept[:, 4:] > 200).all()


def test_a_legend_names_the_largest_and_counts_the_rest(tmp_path, figures):
    labels = np.array([[2, 2, 2, 0], [2, 2, 0, IGNORE]])
    names = ["_a", "b", "traffic_sign_speed_limit_30_kmh"]
    row = Image.new("RGB", (4, 2)), labels
    texts = pictures.labelled(tmp_path / "x.png", [row], names, shares=True)
    assert texts == ["71.4 % traffic_sign_s…d_limit_30_kmh", "28.6 % _a", "no label"]
    (drawn,) = figures[0].legends
    assert [text.get_text().strip() for text in drawn.get_texts()] == texts
    colours = [patch.get_facecolor() for patch in drawn.get_patches()]
    assert np.allclose(colours[0][:3], pictures.PALETTE[2] / 255) and colours[2] == (0, 0, 0, 1)
    many = pictures.legend([f"n{i}" for i in range(30)], [np.arange(30)[None]], ["n1"])
    texts = [patch.get_label() for patch in many]
    assert len(texts) == 13 and texts[:2] == [" n0", " n1 *"] and texts[-1] == " and 18 more"
    (void,) = pictures.legend(["a"], [np.full((2, 2), IGNORE)], shares=True)
    assert void.get_label() == " no label"


def test_a_panorama_gives_a_sheet(tmp_path):
    row = Image.new("RGB", (20_000, 1)), np.zeros((1, 20_000), np.int64)
    pictures.labelled(tmp_path / "x.png", [row], [r"дом $\q$"])
    sheet = Image.open(tmp_path / "x.png")
    assert max(sheet.size) < 2500 and 600 < sheet.width < 1500


def test_curves(tmp_path, figures):
    """Zero-shot at step 0; batches and evaluations as two series; scores that have no value."""
    log = [dict(step=0, seen=4, unseen=3, harmonic=3.4, reference_share_teacher=0.2),
           dict(step=0, tpa_loss=1, reference_share_teacher=0.3),
           dict(step=1, segmentation_loss=1, spd_loss=0, reference_share=0.5),
           dict(step=2, unseen=None, mIoU_ground_truth=30, reference_share_teacher=0.4)]
    pictures.curves(log, tmp_path / "curves.png")
    lines = [line for ax in figures[0].axes for line in ax.lines]
    assert {line.get_label(): line.get_xydata().tolist() for line in lines} == {
        "segmentation_loss": [[1, 1]], "spd_loss": [[1, 0]], "reference_share": [[1, 0.5]],
        "reference_share_teacher": [[0, 0.2], [0, 0.3], [2, 0.4]], "seen": [[0, 4]],
        "unseen": [[0, 3]], "harmonic": [[0, 3.4]], "mIoU_ground_truth": [[2, 30]]}

from __future__ import annotations

import numpy as np
import pytest

from anchorline.runtime import drawing as label_text
from anchorline.runtime.detections import Detections
from anchorline.runtime.drawing import PALETTE, class_colour, draw, ink
from anchorline.runtime.io.errors import FrameError, SettingsError


def one(box, label=0, score=0.5, name="cat"):
    return Detections(boxes=[box], scores=[score], labels=[label], class_names=(name,) * (label + 1))


def blank(height=240, width=320):
    return np.zeros((height, width, 3), np.uint8)


def test_the_frame_itself_stays_as_it_was():
    frame = blank()
    drawn = draw(frame, one([50, 60, 100, 120]))
    assert not frame.any()
    assert drawn.any()
    assert drawn.shape == frame.shape


def test_nothing_found_draws_nothing():
    np.testing.assert_array_equal(draw(blank(), Detections.empty()), blank())


def test_the_box_is_on_its_edges():
    drawn = draw(blank(), one([50, 60, 100, 120]), labels=False)
    rows, columns = np.nonzero(drawn.any(axis=2))
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (60, 120, 50, 100)
    assert tuple(drawn[60, 75]) == class_colour(0)
    assert not drawn[90, 75].any()


@pytest.mark.parametrize(
    "box",
    [
        [0, 0, 320, 240],
        [0, 0, 5, 5],
        [315, 235, 320, 240],
        [310, 0, 320, 8],
        [0, 230, 9, 240],
        [7, 7, 7, 7],
        [320, 240, 320, 240],
        [-50, -50, 1000, 1000],
    ],
)
def test_a_label_is_whole_inside_the_frame_wherever_the_box_is(box):
    """The plate with its text covers as many pixels as that of a box in the middle."""
    middle = draw(blank(), one([100, 100, 101, 101]))
    plate = np.count_nonzero(middle.any(axis=2))
    drawn = draw(blank(), one(box))
    assert np.count_nonzero(drawn.any(axis=2)) >= plate - 1


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (20, 30), (40, 40), (2160, 3840)])
def test_any_resolution(size):
    drawn = draw(blank(*size), one([0, 0, size[1], size[0]], name="a rather long class name"))
    assert drawn.any()


def test_lines_and_text_grow_with_the_frame():
    def line_width(scale):
        drawn = draw(blank(240 * scale, 320 * scale), one(np.array([50, 60, 100, 120]) * scale), labels=False)
        return np.count_nonzero(drawn[90 * scale, : 75 * scale].any(axis=1))

    assert line_width(1) < line_width(4) < line_width(9)


def test_the_stronger_detection_is_on_top():
    both = Detections(boxes=[[50, 60, 100, 120]] * 2, scores=[0.9, 0.2], labels=[0, 1])
    assert tuple(draw(blank(), both, labels=False)[60, 75]) == class_colour(0)


def test_colours_are_stable_and_distinct():
    assert len(set(PALETTE)) == len(PALETTE)
    assert class_colour(3) == class_colour(3 + len(PALETTE)) == PALETTE[3]


# What people see who lack one kind of cone, in linear RGB: Machado, Oliveira and Fernandes, "A
# Physiologically-based Model for Simulation of Color Vision Deficiency", 2009, table 1, severity 1.
SEEN_BY = {
    "all cones": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
}


def cie_lab(linear):
    """CIE L*a*b* of linear sRGB [N, 3], white point D65."""
    to_xyz = [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
    xyz = linear @ np.array(to_xyz).T / [0.95047, 1.0, 1.08883]
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


def colour_distances(colours, seen_by):
    """CIE76 differences of all pairs of BGR colours; 2.3 is just noticeable."""
    rgb = np.array(colours)[:, ::-1] / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    lab = cie_lab(np.clip(linear @ SEEN_BY[seen_by].T, 0, 1))
    first, second = np.triu_indices(len(lab), 1)
    return np.linalg.norm(lab[first] - lab[second], axis=1)


def test_the_simulation_of_colour_blindness_mixes_up_red_and_green():
    red_and_green = [(0, 0, 200), (0, 110, 60)]
    assert colour_distances(red_and_green, "all cones") > 90
    assert colour_distances([(60, 130, 150), (60, 150, 110)], "deuteranopia") < 10
    assert colour_distances([(255, 255, 255), (0, 0, 0)], "protanopia") == pytest.approx(100, abs=0.1)


@pytest.mark.parametrize("seen_by", SEEN_BY)
def test_the_first_eight_colours_differ_for_colour_blind_readers(seen_by):
    assert colour_distances(PALETTE[:8], seen_by).min() >= 15


@pytest.mark.parametrize("colour", PALETTE)
def test_text_contrasts_with_its_plate(colour):
    """WCAG 2: at least 3 to 1 for large text, with either ink."""

    def luminance(bgr):
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(bgr) / 255]
        return np.dot(linear, [0.0722, 0.7152, 0.2126])

    dark, light = sorted([luminance(colour), luminance(ink(colour))])
    assert (light + 0.05) / (dark + 0.05) >= 4.5


@pytest.mark.parametrize("unicode_font", [True, False])
def test_a_name_beyond_ascii(monkeypatch, unicode_font):
    monkeypatch.setattr(label_text, "_FONT_HAS_UNICODE", unicode_font and label_text._FONT_HAS_UNICODE)
    label_text.fitted.cache_clear()
    with_name = draw(blank(), one([50, 60, 100, 120], name="кот"))
    without = draw(blank(), one([50, 60, 100, 120], name=""))
    assert np.count_nonzero(with_name.any(axis=2)) > np.count_nonzero(without.any(axis=2))


def test_what_is_no_frame_is_refused():
    with pytest.raises(FrameError, match="got None"):
        draw(None, Detections.empty())


def test_one_colour_can_stand_for_all_classes():
    drawn = draw(blank(), one([50, 60, 100, 120], label=3), colour=(1, 2, 3))
    assert tuple(drawn[119, 75]) == (1, 2, 3)
    assert not (drawn == class_colour(3)).all(axis=2).any()


def plates_of(drawn, label):
    """How many pixels have the colour of a class."""
    return np.count_nonzero((drawn == class_colour(label)).all(axis=2))


def test_labels_of_boxes_that_lie_on_each_other_can_all_be_read():
    """Three plates of three classes show as much of their colour as each of them alone."""
    boxes = [[100, 80, 200, 160], [102, 82, 202, 162], [104, 84, 204, 164]]
    together = Detections(boxes, [0.9, 0.8, 0.7], [0, 1, 2], ("cat", "dog", "cow"))
    drawn = draw(blank(), together)
    for index in range(3):
        alone = draw(blank(), together[index])
        lines = plates_of(draw(blank(), together[index], labels=False), index)
        assert (
            plates_of(drawn, index) >= plates_of(alone, index) - lines - 40
        )  # the boxes' lines may be hidden


def test_a_small_picture_of_a_crowd_is_still_a_picture():
    """At 160x120 labels of thirty boxes cover a third at most, and the strongest has its own."""
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, [120, 90], (30, 2))
    crowd = Detections(
        np.concatenate([corners, corners + 25], axis=1), np.linspace(0.9, 0.5, 30), [0] * 30, ("person",)
    )
    lines = draw(blank(120, 160), crowd, labels=False)
    drawn = draw(blank(120, 160), crowd)
    labels = np.count_nonzero((drawn != lines).any(axis=2))
    assert 0 < labels <= 0.34 * 120 * 160
    alone = draw(blank(120, 160), crowd[:1])
    plate = (alone != draw(blank(120, 160), crowd[:1], labels=False)).any(axis=2)
    np.testing.assert_array_equal(drawn[plate], alone[plate])


def tracked(box, number):
    return Detections([box], [0.5], [0], ("cat",), track_ids=[number])


def test_the_track_is_on_the_label_where_there_is_one():
    box = [50, 60, 100, 120]
    without = draw(blank(), tracked(box, -1))
    np.testing.assert_array_equal(without, draw(blank(), one(box)))
    np.testing.assert_array_equal(without, draw(blank(), tracked(box, 12), ids=False))
    assert plates_of(draw(blank(), tracked(box, 12)), 0) > plates_of(without, 0)


def test_a_trail_is_drawn_where_the_object_was():
    points = np.array([[10, 200], [60, 200], [110, 200]], np.float32)
    drawn = draw(blank(), tracked([90, 150, 130, 190], 3), trails={3: points, 4: points - 100}, labels=False)
    row = drawn[200]
    assert row[12:108].any(axis=1).all()
    assert not row[:8].any()
    assert tuple(row[100]) == class_colour(0)
    assert not drawn[100].any()  # no trail of a track that is not in the picture


@pytest.mark.parametrize("points", [np.zeros((0, 2)), np.array([[5.0, 5.0]]), np.full((7, 2), 1e6)])
def test_a_trail_of_any_length_and_place(points):
    assert draw(blank(), tracked([90, 150, 130, 190], 3), trails={3: points}).any()


def test_trails_of_what_is_not_tracked_are_nothing():
    plain = draw(blank(), one([90, 150, 130, 190]))
    np.testing.assert_array_equal(draw(blank(), one([90, 150, 130, 190]), trails={0: np.ones((2, 2))}), plain)


def test_in_a_video_labels_stay_where_they_are_while_scores_change():
    """Both at one box: with tracks the older one keeps its place, whichever is the stronger now."""
    both = {
        "boxes": [[100, 80, 200, 160]] * 2,
        "labels": [0, 1],
        "class_names": ("cat", "dog"),
        "track_ids": [4, 9],
    }
    first = draw(blank(), Detections(scores=[0.61, 0.60], **both), scores=False)
    second = draw(blank(), Detections(scores=[0.60, 0.61], **both), scores=False)
    assert plates_of(first[:80], 0) == plates_of(second[:80], 0) > 0


def test_names_that_are_no_text_are_drawn_escaped() -> None:
    """Half a UTF-16 pair ended the process inside OpenCV."""
    escaped, plain = (Detections([[5, 30, 90, 90]], [0.5], [0], (name,)) for name in ("\ud800", "\\ud800"))
    frame = np.zeros((100, 200, 3), np.uint8)
    np.testing.assert_array_equal(draw(frame, escaped), draw(frame, plain))


@pytest.mark.parametrize("colour", ["red", (1, 2), 7, (300, 0, 0), (None,) * 3, (float("nan"),) * 3])
def test_what_is_no_colour_is_one_line(colour):
    found = Detections([[5, 5, 30, 30]], [0.9], [0])
    with pytest.raises(SettingsError, match=r"^colour is .*; expected blue, green and red"):
        draw(np.zeros((48, 64, 3), np.uint8), found, colour=colour)
    bytes_of = tuple(np.array([1, 2, 3], np.uint8))
    assert (draw(np.zeros((48, 64, 3), np.uint8), found, colour=bytes_of)[5, 20] == [1, 2, 3]).all()


def test_what_are_no_detections_is_one_line():
    with pytest.raises(SettingsError, match=r"^what to draw is array\(.*expected Detections"):
        draw(np.zeros((48, 64, 3), np.uint8), np.zeros((9, 6)))


def test_class_names_that_are_numbers_are_drawn():
    found = Detections([[5, 5, 30, 30]], [0.9], [0], class_names=(7,))
    assert draw(np.zeros((48, 64, 3), np.uint8), found).any()

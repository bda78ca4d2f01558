from __future__ import annotations

import numpy as np
import pytest

from anchorline.runtime import drawing
from anchorline.runtime.detections import Detections
from anchorline.runtime.drawing import PALETTE, _ink, class_colour, draw
from anchorline.runtime.errors import FrameError


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


@pytest.mark.parametrize("colour", PALETTE)
def test_text_contrasts_with_its_plate(colour):
    """WCAG 2: at least 3 to 1 for large text, with either ink."""

    def luminance(bgr):
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(bgr) / 255]
        return np.dot(linear, [0.0722, 0.7152, 0.2126])

    dark, light = sorted([luminance(colour), luminance(_ink(colour))])
    assert (light + 0.05) / (dark + 0.05) >= 4.5


@pytest.mark.parametrize("unicode_font", [True, False])
def test_a_name_beyond_ascii(monkeypatch, unicode_font):
    monkeypatch.setattr(drawing, "_FONT_HAS_UNICODE", unicode_font and drawing._FONT_HAS_UNICODE)
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

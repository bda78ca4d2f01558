"""Slices of large frames: where they lie, what is made of what they show, and plain detection without any."""

from __future__ import annotations

import dataclasses
import pickle
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchorline.runtime import Detector, Nv12, SliceOptions, VideoPipeline
from anchorline.runtime import slices as slicing
from anchorline.runtime.backends.onnxruntime import OnnxRuntimeBackend
from anchorline.runtime.contract import Contract, ResizeRule
from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import FrameError, SettingsError
from anchorline.runtime.slices import Found, Slicer, slice_views, suppress
from anchorline.runtime.video.options import DetectOptions, Filters, parse_slices

pytest.importorskip("onnxruntime")

CONTRACT = Contract(
    task="detections",
    names=("a", "b"),
    canvas=(64, 64),
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# Where they lie.

sides = st.integers(64, 300)


@given(size=st.tuples(st.integers(1, 900), st.integers(1, 900)), slice_sides=st.tuples(sides, sides),
       overlap=st.floats(0, 0.9))  # fmt: skip
def test_slices_cover_each_pixel_and_keep_their_size(size, slice_sides, overlap):
    views = slice_views(size, slice_sides, overlap, full=False)
    for axis, (length, side) in enumerate(zip(size, slice_sides, strict=True)):
        begins, ends = views[:, 1 - axis], views[:, 3 - axis]
        assert (ends - begins == min(length, side)).all()
        starts = np.unique(begins)
        assert starts[0] == 0
        assert ends.max() == length
        # Neighbours share at least the overlap, so whatever is as small is whole in one of them.
        assert (np.diff(starts) <= side - int(side * overlap)).all()
    assert len(np.unique(views, axis=0)) == len(views)


def test_the_last_row_and_column_move_inwards():
    views = slice_views((100, 250), (100, 100), 0.2, full=True)
    assert views.tolist() == [[0, 0, 100, 100], [80, 0, 180, 100], [150, 0, 250, 100], [0, 0, 250, 100]]


def test_a_frame_that_is_smaller_than_a_slice_is_one():
    assert slice_views((70, 90), (100, 100), 0.2, full=True).tolist() == [[0, 0, 90, 70]]
    assert slice_views((100, 100), (100, 100), 0.2, full=True).tolist() == [[0, 0, 100, 100]]


def test_more_slices_than_anybody_means_are_refused():
    with pytest.raises(FrameError, match=r"2160x3840 has 162841 slices of 64x64 .* expected at most 4096"):
        slice_views((2160, 3840), (64, 64), 0.9, full=True)


# What is made of what they show.

OVERLAP = 0.25
SIDE = 128


def objects_apart(size, share, rng) -> np.ndarray:
    """Boxes [N, 4] of objects that do not touch, a little smaller than the overlap, as whole pixels.

    One in a ``share`` of the cells of a grid, so that they are apart however they are drawn.
    """
    cell = int(SIDE * OVERLAP)
    tops, lefts = (np.arange(0, length - cell, cell) for length in size)
    corners = np.stack(np.meshgrid(lefts, tops), axis=-1).reshape(-1, 2)
    corners = corners[rng.random(len(corners)) < share]
    sides = rng.integers(4, cell - 3, corners.shape)
    places = corners + rng.integers(0, cell - sides + 1)
    return np.concatenate([places, places + sides], axis=1).astype(np.float64)


def what_is_seen(boxes, views, rng) -> list[Detections]:
    """What a perfect detector finds in each view: the whole objects, and cuts of others with any score."""
    found = []
    for left, top, right, bottom in views.tolist():
        cut = np.clip(boxes, [left, top, left, top], [right, bottom, right, bottom])
        seen = (cut[:, 2:] - cut[:, :2] > 0).all(axis=1)
        own = cut[seen] - [left, top, left, top]
        labels = np.flatnonzero(seen) % 2
        found.append(Detections(own, rng.uniform(0.05, 1.0, len(own)), labels, ("a", "b")))
    return found


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("merge_by", ["ios", "iou"])
@pytest.mark.parametrize("merge", ["nms", "weighted"])
@settings(max_examples=40)
@given(
    size=st.tuples(st.integers(1, 500), st.integers(1, 500)),
    share=st.sampled_from([0.02, 0.3, 1.0]),
    seed=st.integers(0, 9999),
)
def test_an_object_across_a_border_comes_once_and_whole(full, merge_by, merge, size, share, seed):
    rng = np.random.default_rng(seed)
    boxes = objects_apart(size, share, rng)
    options = SliceOptions(SIDE, overlap=OVERLAP, full=full, merge=merge, merge_by=merge_by)
    slicer = Slicer(options, CONTRACT)
    views = slicer.views(size)
    found = what_is_seen(boxes, views, rng)
    merged = slicer.merge(found, views, size)
    assert (np.diff(merged.scores) <= 0).all()
    expected = np.column_stack([boxes, np.arange(len(boxes)) % 2])
    got = np.column_stack([merged.boxes, merged.labels])
    assert len(got) == len(expected)
    # In one order, for the scores are drawn.
    by_place = [each[np.lexsort(each.T[::-1])] for each in (got.round(2), expected)]
    np.testing.assert_allclose(*by_place, atol=0.01)


def test_what_one_view_shows_apart_stays_apart():
    """A small object before a large one of its class: by their IoS they are one."""
    views = slice_views((100, 180), (100, 100), 0.2, full=False)
    nested = Detections([[2, 10, 60, 90], [20, 30, 40, 60]], [0.9, 0.8], [0, 0])
    merged = Slicer(SliceOptions(100), CONTRACT).merge([nested, Detections.empty()], views, (100, 180))
    assert merged.boxes.tolist() == nested.boxes.tolist()


@pytest.mark.parametrize(("merge_by", "kept"), [("ios", [0.9]), ("iou", [0.9, 0.8])])
def test_by_iou_a_small_one_before_a_large_one_leaves_both(merge_by, kept):
    """The slice shows the small one, the whole frame the large one that is larger than the slice."""
    views = slice_views((100, 180), (100, 100), 0.2, full=True)
    small, large = Detections([[30, 30, 50, 60]], [0.9], [0]), Detections([[10, 5, 170, 95]], [0.8], [0])
    slicer = Slicer(SliceOptions(100, merge_by=merge_by), CONTRACT)
    merged = slicer.merge([small, Detections.empty(), large], views, (100, 180))
    np.testing.assert_allclose(merged.scores, kept, rtol=1e-6)


def test_classes_are_merged_apart_and_weights_are_scores():
    views = np.array([[0, 0, 100, 100], [0, 0, 100, 100]])
    found = [
        Detections([[10, 10, 30, 30], [10, 10, 30, 30]], [0.6, 0.5], [0, 1]),
        Detections([[14, 10, 34, 30]], [0.2], [0]),
    ]
    merged = Slicer(SliceOptions(100), CONTRACT).merge(found, views, (100, 100))
    assert merged.boxes.tolist() == [[10, 10, 30, 30], [10, 10, 30, 30]]
    assert merged.labels.tolist() == [0, 1]
    weighted = Slicer(SliceOptions(100, merge="weighted"), CONTRACT).merge(found, views, (100, 100))
    np.testing.assert_allclose(weighted.boxes, [[11, 10, 31, 30], [10, 10, 30, 30]], rtol=1e-6)
    np.testing.assert_allclose(weighted.scores, [0.6, 0.5])


def drawn_boxes(count, objects, rng, frame=(2160, 3840), most=40) -> Found:
    corners = rng.uniform(0, [frame[1] - most, frame[0] - most], (objects, 2))
    whole = np.concatenate([corners, corners + rng.uniform(12, most, (objects, 2))], axis=1)
    which = rng.integers(0, objects, count)
    return Found(
        whole[which] + rng.normal(0, 1.5, (count, 4)),
        rng.random(count, dtype=np.float32),
        which % 3,
        rng.integers(0, 40, count),
        rng.random(count) < 0.3,
    )


def one_by_one(found: Found, threshold: float, by: str) -> list[int]:
    """Greedy NMS as it is told, box by box."""
    stands_for, kept = [-1] * len(found.boxes), []
    for index in np.lexsort((-found.scores, found.cut)).tolist():
        stands_for[index] = index
        for other in kept:
            if found.labels[other] != found.labels[index] or found.views[other] == found.views[index]:
                continue
            a, b = found.boxes[other], found.boxes[index]
            w, h = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0)
            first, second = (a[2:] - a[:2]).prod(), (b[2:] - b[:2]).prod()
            smaller = by == "ios" or found.cut[index]
            if w * h > threshold * (min(first, second) if smaller else first + second - w * h):
                stands_for[index] = other
                break
        else:
            kept.append(index)
    return stands_for


@pytest.mark.parametrize("by", ["ios", "iou"])
@pytest.mark.parametrize(("objects", "most"), [(5, 40), (60, 150), (400, 40)])
def test_the_grid_and_the_blocks_change_nothing(by, objects, most, monkeypatch):
    found = drawn_boxes(500, objects, np.random.default_rng(objects), (200, 300), most)
    expected = one_by_one(found, 0.5, by)
    assert suppress(found, 0.5, by).tolist() == expected
    monkeypatch.setattr(slicing, "_ROWS", 7)
    monkeypatch.setattr(slicing, "_PAIRS", 100)
    assert suppress(found, 0.5, by).tolist() == expected


def test_nms_of_torchvision_where_all_boxes_are_whole_and_of_other_views():
    torch = pytest.importorskip("torch")
    from torchvision.ops import batched_nms

    found = drawn_boxes(3000, 300, np.random.default_rng(1), (700, 900))
    found = dataclasses.replace(found, views=np.arange(3000), cut=np.zeros(3000, bool))
    stands_for = suppress(found, 0.5, "iou")
    boxes, scores, labels = (torch.from_numpy(each) for each in (found.boxes, found.scores, found.labels))
    expected = batched_nms(boxes, scores.double(), labels, 0.5)
    assert np.flatnonzero(stands_for == np.arange(3000)).tolist() == sorted(expected.tolist())


def test_33000_boxes_take_few_comparisons(monkeypatch):
    """All pairs would be 500 million; and half a second of this thread's time, whatever else runs."""
    compared = 0
    common = slicing._common_areas

    def counted(a, b):
        nonlocal compared
        compared += len(a)
        return common(a, b)

    monkeypatch.setattr(slicing, "_common_areas", counted)
    found = drawn_boxes(33_000, 3_000, np.random.default_rng(2))
    start = time.thread_time()
    stands_for = suppress(found, 0.5, "ios")
    spent = time.thread_time() - start
    assert 3_000 <= len(np.unique(stands_for)) < 6_000
    assert compared < 60 * 33_000
    assert spent < 0.5


# Through a model.


@pytest.fixture(scope="module")
def free_path(tmp_path_factory, write_model, contract):
    resize = ResizeRule(shorter_side=48, longer_side=96)
    free = dataclasses.replace(contract, canvas=None, resize=resize)
    return write_model(tmp_path_factory.mktemp("free") / "model.onnx", free)


@pytest.fixture(params=["fixed", "free"])
def path(request, model_path, free_path):
    return model_path if request.param == "fixed" else free_path


def same(one: Detections, other: Detections) -> bool:
    return one.size == other.size and all(
        getattr(one, name).tobytes() == getattr(other, name).tobytes()
        for name in ("boxes", "scores", "labels")
    )


def test_one_slice_is_plain_detection_to_the_bit(path):
    frames = [noise(200, 300), noise(64, 64, 1), noise(199, 300, 2)]
    with (
        Detector(path, threads=1) as plain,
        Detector(path, threads=1, slices=SliceOptions(200, 300)) as sliced,
    ):
        assert all(map(same, sliced.batch(frames), plain.batch(frames)))
        assert same(sliced(frames[0]), plain(frames[0]))
        assert list(map(len, sliced.stream(frames))) == list(map(len, plain.stream(frames)))
        assert sliced.views((200, 300)) == 1


def test_each_view_is_detected_as_a_frame_of_its_own(path):
    frame = noise(150, 220)
    options = SliceOptions(100, 120, overlap=0.2)
    with Detector(path, threads=1) as plain, Detector(path, threads=1, slices=options) as sliced:
        views = sliced.slicer.views((150, 220))
        assert len(views) == sliced.views((150, 220)) == 7
        alone = [plain(frame[top:bottom, left:right]) for left, top, right, bottom in views.tolist()]
        expected = sliced.slicer.merge(alone, views, (150, 220))
        assert same(sliced(frame), expected)
        assert sliced(frame).category_ids == (7, 9)
        # Neither the batch nor the stream changes a frame's result.
        small = noise(40, 50, 3)
        together = sliced.batch([small, frame, noise(220, 150, 4)])
        for got, wanted in zip(together, [plain(small), expected], strict=False):
            np.testing.assert_allclose(got.boxes, wanted.boxes, rtol=1e-6)
            np.testing.assert_allclose(got.scores, wanted.scores, rtol=1e-6)
        for got in sliced.stream([frame] * 3, batch=2):
            np.testing.assert_allclose(got.boxes, expected.boxes, rtol=1e-6)


@pytest.fixture
def batches(monkeypatch):
    """The number of views in each run of the network."""
    counted, infer = [], OnnxRuntimeBackend.infer

    def count(self, inputs):
        counted.append(len(inputs["images"]))
        return infer(self, inputs)

    monkeypatch.setattr(OnnxRuntimeBackend, "infer", count)
    return counted


def test_views_are_no_copies_and_go_through_in_equal_groups(path, batches):
    frame = noise(150, 420)
    with Detector(path, slices=SliceOptions(64, overlap=0.1, full=False, at_once=7)) as detector:
        detector(frame)
        assert detector.views((150, 420)) == 24
        assert batches == [6, 6, 6, 6]
    views = slice_views((150, 420), (64, 64), 0.1, full=True)
    assert all(np.shares_memory(view, frame) for view in slicing._cut_out(frame, views))


@pytest.mark.parametrize(("most", "expected"), [(1, [1] * 11), (2, [2] * 5 + [1])])
def test_the_largest_batch_of_the_model_bounds_the_groups(
    most, expected, tmp_path, write_model, contract, batches
):
    path = write_model(tmp_path / "a.onnx", dataclasses.replace(contract, max_batch=most))
    large, small = noise(100, 100), noise(30, 40, 1)
    with Detector(path, threads=1, slices=SliceOptions(64)) as detector:
        together = detector.batch([large, small, large])
        assert batches == expected
        assert all(map(same, together, map(detector, [large, small, large])))


@pytest.mark.parametrize(
    ("size", "slice_sides", "views"),
    [
        ((1, 1), (64, 64), 1),
        ((1, 500), (64, 64), 11),  # ten of 1x64
        ((3000, 70), (64, 64), 117),
        ((300, 100), (64, 4000), 7),
        ((100, 300), (4000, 64), 7),
        ((100, 100), (10**30, 10**30), 1),
    ],
)
def test_strips_and_slices_that_are_larger_one_way(path, size, slice_sides, views):
    with Detector(path, threads=1, slices=SliceOptions(*slice_sides)) as detector:
        found = detector(noise(*size))
        assert detector.views(size) == views
    assert found.size == size
    assert len(found) >= 2
    assert (found.boxes >= 0).all()
    assert (found.boxes <= [size[1], size[0], size[1], size[0]]).all()


@pytest.mark.parametrize(
    "view",
    [
        lambda frame: frame[:, ::-1],
        lambda frame: frame[::-1, :, ::-1],
        lambda frame: frame[::2, ::3],
        np.asfortranarray,
        lambda frame: np.frombuffer(frame.tobytes(), np.uint8).reshape(frame.shape),  # not to be written
    ],
)
def test_frames_in_any_layout_are_sliced_as_their_copies(path, view):
    frame = view(noise(240, 360))
    with Detector(path, threads=1, slices=SliceOptions(64)) as detector:
        assert same(detector(frame), detector(np.ascontiguousarray(frame)))


def test_nothing_in_any_view_is_nothing(path):
    with Detector(path, score_threshold=0.5, slices=SliceOptions(64, merge="weighted")) as detector:
        found = detector(np.zeros((150, 200, 3), np.uint8))
    assert len(found) == 0
    assert found.size == (150, 200)
    assert found.class_names == ("whole", "quarter")


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (np.zeros((200, 200, 3), np.float16), r"got float16 \[200, 200, 3\]"),
        (np.full((200, 200, 3), np.nan, np.float32), "got float32"),
        (np.zeros((0, 200, 3), np.uint8), "the frame has no pixels"),
        (np.zeros((64, 600_000, 3), np.uint8), "has 11539 slices of 64x64"),
    ],
)
def test_a_frame_that_is_none_is_refused_and_spoils_nothing(path, frame, words):
    with Detector(path, threads=1, slices=SliceOptions(64)) as detector:
        with pytest.raises(FrameError, match=words):
            detector.batch([noise(100, 100), frame])
        assert len(detector(noise(100, 100))) >= 2


def test_nv12_frames_are_sliced_as_the_bgr_they_hold(model_path):
    import cv2

    pixels = np.random.default_rng(5).integers(16, 235, (240, 200), dtype=np.uint8)
    bgr = cv2.cvtColor(pixels, cv2.COLOR_YUV2BGR_NV12)
    with Detector(model_path, threads=1, slices=SliceOptions(64)) as detector:
        assert same(detector(Nv12(pixels)), detector(bgr))


def test_a_sliced_detector_is_pickled_with_its_slices(model_path):
    detector = Detector(model_path, slices=SliceOptions(64))
    with detector, pickle.loads(pickle.dumps(detector)) as again:
        assert again.slicer.sides == (64, 64)
        assert same(again(noise(90, 90)), detector(noise(90, 90)))


def test_the_pipeline_is_the_same_and_tells_the_cost(model_path, tmp_path, picture):
    import cv2

    frame = noise(100, 120)
    cv2.imwrite(str(tmp_path / "a.png"), frame)
    options = DetectOptions(
        provider="cpu",
        threads=1,
        slices=SliceOptions(64),
        filters=Filters(regions=(((0, 0), (0.5, 0), (0.5, 1), (0, 1)),)),
    )
    with options.open_detector(model_path) as detector:
        pipeline = VideoPipeline(detector, [tmp_path / "a.png"], options)
        (result,) = pipeline
        assert same(result.detections, options.filters(detector(frame), (100, 120)))
        summary = pipeline.summary()
    assert summary.views == 7
    assert summary.detect_ms > 0


# What is refused.


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"height": 63}, "height is 63; expected a whole number of at least 64"),
        ({"height": 64, "width": 10}, "width is 10; expected a whole number of at least 64"),
        ({"width": 64}, "slices have a width of 64 and no height"),
        ({"height": 64, "overlap": 0.95}, r"overlap is 0\.95; expected a number from 0 to 0\.9"),
        ({"height": 64, "overlap": -0.1}, r"overlap is -0\.1; expected a number from 0 to 0\.9"),
        ({"height": 64, "merge": "nmm"}, "merge is 'nmm'; expected one of nms, weighted"),
        ({"height": 64, "at_once": 0}, "at_once is 0; expected a whole number of at least 1"),
    ],
)
def test_absurd_slices_are_refused(values, words):
    with pytest.raises(SettingsError, match=words):
        SliceOptions(**values)


@pytest.mark.parametrize("text", ["", "640,640", "640x", "x", "-3x3", "auto640", "6.5"])
def test_other_texts_than_sizes_are_refused(text):
    with pytest.raises(SettingsError, match="expected HEIGHTxWIDTH in pixels, such as 640x640, or auto"):
        parse_slices(text)


def test_sizes_are_read():
    assert parse_slices("480x640") == {"height": 480, "width": 640}
    assert parse_slices("640") == {"height": 640, "width": 640}
    assert parse_slices("auto") == {}


def test_a_model_that_cannot_be_sliced_is_refused(model_path, contract):
    with pytest.raises(SettingsError, match="does not tell how large the objects were"):
        Detector(model_path, slices=SliceOptions())
    with pytest.raises(SettingsError, match="expected SliceOptions"):
        Detector(model_path, slices=640)  # type: ignore[arg-type]
    proposals = dataclasses.replace(contract, task="proposals", outputs=("boxes", "scores", "num_proposals"))
    with pytest.raises(SettingsError, match="the model's task is proposals"):
        Slicer(SliceOptions(64), proposals)


# Sizes by the objects that were trained on.


@pytest.mark.parametrize(
    ("image", "canvas", "expected"),
    [
        # 30 px in a fifth of a slice want 150, more than the canvas.
        ([10, 20, 30], [10, 20, 30], (160, 160)),
        ([10, 40, 60], [5, 20, 30], (320, 320)),  # 60 px want 300
        ([1, 2, 3], [0.5, 1, 1.5], (128, 128)),  # the network saw images at half their size
    ],
)
def test_the_size_follows_the_training(image, canvas, expected):
    source = {slicing.OBJECT_SIDES: {"image": image, "canvas": canvas}}
    contract = dataclasses.replace(CONTRACT, source=source)
    assert Slicer(SliceOptions(), contract).sides == expected


@pytest.mark.parametrize(
    "sides",
    [None, 3, {}, {"image": [1, 2], "canvas": [1, 2, 3]}, {"image": [0, 0, 0], "canvas": [1, 2, 3]},
     {"image": ["a", "b", "c"], "canvas": [1, 2, 3]}],
)  # fmt: skip
def test_damaged_object_sizes_are_none(sides):
    contract = dataclasses.replace(CONTRACT, source={slicing.OBJECT_SIDES: sides})
    with pytest.raises(SettingsError, match="name a size, such as --slice 640x640"):
        Slicer(SliceOptions(), contract)

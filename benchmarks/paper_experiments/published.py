"""The paper's own numbers (arXiv 1506.01497v3, PASCAL VOC 2007 test, VOC07 mAP in %), and what they show.

All were compared with the text of tables 2, 3, 5, 8, 9 and 10. The keys are ours: (experiment, variant,
proposals), where a missing part stands for any.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """A line of a table: its label, the key of our rows, the paper's numbers as text."""

    label: str
    experiment: str
    variant: str = ""
    proposals: str = ""
    paper: str = "-"


@dataclass(frozen=True)
class Trend:
    """A difference between two lines, and the paper's for it in points of mAP.

    ``sign`` is what the paper shows: 1 where the first is better, -1 where it is worse, 0 where they are
    close, less than ``CLOSE`` points apart.
    """

    first: str
    second: str
    sign: int
    paper: str


CLOSE = 2.0


@dataclass(frozen=True)
class Table:
    """One of the paper's tables. ``comparable`` says what of the data and the model differs for this one."""

    title: str
    lines: tuple[Line, ...]
    trends: tuple[Trend, ...]
    comparable: str
    recall: bool = False


_RPN = "RPN, {} proposals"


def _ablation() -> tuple[Line, ...]:
    paper = {
        ("RPN", 100): "55.1",
        ("RPN", 300): "56.8",
        ("RPN", 1000): "56.3",
        ("no NMS", 6000): "55.2",
        ("no cls", 100): "44.6",
        ("no cls", 300): "51.4",
        ("no cls", 1000): "55.8",
        ("no reg", 300): "52.1",
        ("no reg", 1000): "51.3",
    }
    counts = {"no NMS": (50, 100, 300, 1000, 6000)}
    return tuple(
        Line(
            (_RPN if name == "RPN" else f"{name}, {{}} proposals").format(count),
            *("proposals", name, str(count)),
            paper.get((name, count), "-"),
        )
        for name in ("RPN", "no NMS", "no cls", "no reg")
        for count in counts.get(name, (50, 100, 300, 1000))
    )


TABLES = (
    Table(
        "Shared and unshared features, and joint training (tables 2 and 3)",
        (
            Line("alternating, shared (4 steps)", "alternating", "shared", paper="ZF 59.9, VGG 69.9"),
            Line(
                "alternating, unshared (steps 1 and 2)", "alternating", "unshared", paper="ZF 58.7, VGG 68.5"
            ),
            Line("joint", "joint", paper='"close results" (3.2)'),
        ),
        (
            Trend("alternating, shared (4 steps)", "alternating, unshared (steps 1 and 2)", 1, "+1.2, +1.4"),
            Trend("joint", "alternating, shared (4 steps)", 0, "close"),
        ),
        "Joint and alternating training pass over the data equally often here. The unshared pair has had the "
        "epochs of two steps alone, so part of what it lacks is training; in the paper the steps are long.",
    ),
    Table(
        "The RPN against selective search (tables 2 and 3)",
        (
            Line("selective search, 2000", "selective-search", paper="ZF 58.7, VGG 66.9"),
            Line("RPN unshared, 300", "alternating", "unshared", paper="ZF 58.7, VGG 68.5"),
            Line("RPN shared, 300", "alternating", "shared", paper="ZF 59.9, VGG 69.9"),
            Line("RPN of joint training, 300", "joint"),
            Line("selective search's detector, 300 of an RPN", "proposals", "RPN", "300", paper="ZF 56.8"),
        ),
        (
            Trend("RPN shared, 300", "selective search, 2000", 1, "+1.2, +3.0"),
            Trend("RPN of joint training, 300", "selective search, 2000", 1, "-"),
            Trend("selective search's detector, 300 of an RPN", "selective search, 2000", 0, "-1.9"),
        ),
        "Selective search is OpenCV's fast mode, or a file. Its detector has as many epochs as joint "
        "training: these two are the even pair. The last line is its detector on the joint run's proposals.",
    ),
    Table(
        "Test proposals, without NMS, without scores, without regression (table 2)",
        _ablation(),
        (
            Trend("RPN, 300 proposals", "RPN, 100 proposals", 1, "+1.7"),
            Trend("RPN, 300 proposals", "no NMS, 6000 proposals", 0, "+1.6"),
            Trend("no cls, 100 proposals", "RPN, 100 proposals", -1, "-10.5"),
            Trend("no cls, 1000 proposals", "RPN, 1000 proposals", 0, "-0.5"),
            Trend("no reg, 300 proposals", "RPN, 300 proposals", -1, "-4.7"),
        ),
        "The paper's RPN (ZF) was trained alone and long, its detector on selective search. Ours is the RPN "
        "of the joint run, since step 1's has few epochs, and a detector that shares nothing with it. 6000 "
        "proposals are at most the anchors of one image.",
        recall=True,
    ),
    Table(
        "Anchors (table 8)",
        (
            Line("1 scale, 1 ratio", "anchors", "1 scale, 1 ratio", paper="65.8 (128), 66.7 (256)"),
            Line("1 scale, 3 ratios", "anchors", "1 scale, 3 ratios", paper="68.8 (128), 67.9 (256)"),
            Line("3 scales, 1 ratio", "anchors", "3 scales, 1 ratio", paper="69.8"),
            Line("3 scales, 3 ratios", "joint", paper="69.9"),
        ),
        (
            Trend("3 scales, 3 ratios", "1 scale, 1 ratio", 1, "+4.1, +3.2"),
            Trend("1 scale, 3 ratios", "1 scale, 1 ratio", 1, "+3.0, +1.2"),
            Trend("3 scales, 3 ratios", "3 scales, 1 ratio", 0, "+0.1"),
        ),
        "Joint training; the single scale is the middle one. The paper's VGG-16 was trained in alternation.",
        recall=True,
    ),
    Table(
        "lambda of equation (1) (table 9)",
        (
            Line("0.1", "lambda", "0.1", paper="67.2"),
            Line("1", "lambda", "1", paper="68.9"),
            Line("10", "joint", paper="69.9"),
            Line("100", "lambda", "100", paper="69.1"),
        ),
        (
            Trend("10", "0.1", 1, "+2.7"),
            Trend("10", "1", 0, "+1.0"),
            Trend("10", "100", 0, "+0.8"),
        ),
        "Joint training; N_cls is 256 and N_reg the places of the map, as in the paper. On a smaller map the "
        "same lambda weighs more, and the gradient's norm is clipped where the preset does so.",
        recall=True,
    ),
    Table(
        "One stage against two (table 10)",
        (
            Line("two stages, unshared, 300", "alternating", "unshared", paper="58.7"),
            Line("two stages, joint, 300", "joint"),
            Line("one stage, dense windows", "one-stage", paper="53.8 (5 scales of the image: 53.9)"),
        ),
        (
            Trend("two stages, unshared, 300", "one stage, dense windows", 1, "+4.9"),
            Trend("two stages, joint, 300", "one stage, dense windows", 1, "-"),
        ),
        "One scale of the image. The one-stage network has as many epochs as the joint one: these two are "
        "the even pair. The unshared detector, one step of four, has fewer.",
    ),
)

# Table 5: milliseconds on a K40. Its "region-wise" has the NMS, the pooling and the layers behind it.
TIMES = (("VGG-16, K40 (paper)", "141", "10", "47", "198"), ("ZF, K40 (paper)", "31", "3", "25", "59"))

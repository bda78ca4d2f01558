"""Sampling against torchvision's ``BalancedPositiveNegativeSampler``: its counts, and fair draws."""

from __future__ import annotations

import pytest
import torch
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from anchorline.train.model.assign import sample


def candidates(
    positives: int, negatives: int, ignored: int, images: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks [images, N] with the candidates shuffled, differently in each image."""
    kind = torch.tensor([1] * positives + [0] * negatives + [-1] * ignored)
    labels = torch.stack([kind[torch.randperm(len(kind))] for _ in range(images)])
    return labels == 1, labels == 0


def counts_of_torchvision(
    positive: torch.Tensor, negative: torch.Tensor, size: int, share: float
) -> list[list[int]]:
    labels = torch.where(positive, 1, torch.where(negative, 0, -1))
    drawn = BalancedPositiveNegativeSampler(size, share)(list(labels))
    return [[int(mask.sum()) for mask in kind] for kind in drawn]


@pytest.mark.parametrize(
    ("positives", "negatives", "ignored"),
    [
        (50, 500, 20),
        (3, 500, 20),
        (0, 500, 5),
        (50, 4, 5),
        (50, 0, 30),
        (0, 0, 9),
        (1, 1, 0),
        (0, 7, 0),
        (300, 300, 0),
    ],
)
@pytest.mark.parametrize(
    ("size", "share"), [(256, 0.5), (32, 0.25), (7, 0.5), (1, 0.5), (64, 0.0), (64, 1.0)]
)
def test_counts_equal_torchvisions(
    positives: int, negatives: int, ignored: int, size: int, share: float
) -> None:
    positive, negative = candidates(positives, negatives, ignored, images=3)
    indices, drawn = sample(positive, negative, size, share)
    assert indices.shape == drawn.shape == (3, min(size, positive.shape[1]))
    found = [(mask.gather(1, indices) & drawn).sum(dim=1).tolist() for mask in (positive, negative)]
    assert found == counts_of_torchvision(positive, negative, size, share)
    for image in range(3):
        chosen = indices[image, drawn[image]]
        assert len(chosen.unique()) == len(chosen), "drawn twice"
        assert (positive | negative)[image, chosen].all(), "drew an ignored candidate"
        is_positive = positive[image, chosen].int()
        assert (is_positive.diff() <= 0).all(), "positives come first"


def test_images_of_a_batch_have_their_own_counts() -> None:
    positive = torch.zeros(3, 20, dtype=torch.bool)
    positive[0, :10] = True
    positive[1, 4] = True
    negative = torch.zeros(3, 20, dtype=torch.bool)
    negative[0, 10:] = negative[1, 10:12] = True
    _, drawn = sample(positive, negative, 8, 0.5)
    assert drawn.sum(dim=1).tolist() == [8, 3, 0]


def test_every_candidate_is_drawn_equally_often() -> None:
    """Chi-square of 4000 draws: 19 degrees of freedom, above 49 once in 5000 seeds when fair."""
    draws = 4000
    positive = torch.zeros(draws, 40, dtype=torch.bool)
    positive[:, 1::2] = True
    indices, drawn = sample(positive, ~positive, 12, 0.5)
    assert drawn.all()
    times = torch.bincount(indices.flatten(), minlength=40).double()
    assert times[1::2].sum() == times[::2].sum() == draws * 6
    for kind in (times[1::2], times[::2]):
        expected = draws * 6 / 20
        # Drawing without replacement varies less than the multinomial law by 1 - 6/20.
        chi_square = ((kind - expected) ** 2 / expected).sum() / (1 - 6 / 20)
        assert chi_square < 49
        assert chi_square > 4, "suspiciously even: not random"


def test_pairs_are_drawn_independently() -> None:
    """Of 6 candidates 3 are drawn: each of the 15 pairs is drawn together in 1 of 5 draws."""
    draws = 3000
    positive = torch.ones(draws, 6, dtype=torch.bool)
    indices, _ = sample(positive, ~positive, 3, 1.0)
    chosen = torch.zeros(draws, 6).scatter_(1, indices, 1.0)
    together = (chosen.T @ chosen / draws)[tuple(torch.triu_indices(6, 6, 1))]
    assert (together - 0.2).abs().max() < 4.5 * (0.2 * 0.8 / draws) ** 0.5


def test_draws_follow_the_seed() -> None:
    positive, negative = candidates(40, 400, 10)

    def draw(seed: int) -> list[int]:
        torch.manual_seed(seed)
        return sample(positive, negative, 64, 0.5)[0].flatten().tolist()

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)

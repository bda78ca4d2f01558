"""Random views of a training image, with torchvision's transforms v2; boxes follow the pixels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.ops import box_area
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from anchorline.train.settings import TrainingSettings

# Labels of boxes that are no objects: of a region to ignore, and of a stored proposal.
IGNORE_LABEL = -2
PROPOSAL_LABEL = -3

# Of an object cut by the edge of a crop, this share of its area must remain for it to stay labelled.
LEAST_VISIBLE = 0.3
PAD_VALUE = 114.0

# An image, its ``boxes``, their ``labels``, and whatever else goes with each box.
View = tuple[tv_tensors.Image, dict[str, Any]]


class RandomZoom(nn.Module):
    """Magnify by a random factor: above 1 crop a part, below 1 set the image in a larger frame.

    No pixel is resampled here; the resize onto the canvas that follows does it, once. Objects of
    which less than ``LEAST_VISIBLE`` remains lose their box; of any other box whatever is left stays.
    """

    def __init__(self, lowest: float, highest: float) -> None:
        super().__init__()
        self.lowest, self.highest = lowest, highest

    def forward(self, image: tv_tensors.Image, target: dict[str, Any]) -> View:
        low, high = torch.tensor([self.lowest, self.highest]).log().tolist()
        factor = float(torch.empty(1).uniform_(low, high).exp())
        height, width = image.shape[-2:]
        new_height, new_width = max(1, round(height / factor)), max(1, round(width / factor))
        # Where the frame is the larger one, it begins above and to the left of the image.
        spare = (height - new_height, width - new_width)
        top, left = (int(torch.randint(min(0, each), max(0, each) + 1, ())) for each in spare)
        area = box_area(target["boxes"])
        if factor < 1:
            margins = [-left, -top, new_width - width + left, new_height - height + top]
            image = F.pad(image, margins, fill=PAD_VALUE)
            boxes = F.pad(target["boxes"], margins)
        else:
            image = F.crop(image, top, left, new_height, new_width)
            boxes = F.clamp_bounding_boxes(F.crop(target["boxes"], top, left, new_height, new_width))
        left_over, objects = box_area(boxes), target["labels"] >= 0
        keep = torch.where(objects, left_over >= LEAST_VISIBLE * area, left_over > 0)
        return image, _kept({**target, "boxes": boxes}, keep)


class RandomIoUCrop(nn.Module):
    """A part of the image that keeps at least one object to a random degree (SSD, section 2.2).

    torchvision's, which divides by zero on images a few pixels wide and searches long where there is
    no object: these stay as they are. Boxes of no object have no say in the choice, and are cut by it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.crop = v2.RandomIoUCrop()

    def forward(self, image: tv_tensors.Image, target: dict[str, Any]) -> View:
        boxes, objects = target["boxes"], target["labels"] >= 0
        if min(image.shape[-2:]) * self.crop.min_scale < 1 or not objects.any():
            return image, target
        params = self.crop.make_params([image, tv_tensors.wrap(boxes[objects], like=boxes)])
        if not params:  # one of the draws is to leave the image whole
            return image, target
        window = [params[name] for name in ("top", "left", "height", "width")]
        keep = (~objects).masked_scatter(objects, params["is_within_crop_area"])
        return F.crop(image, *window), _kept({**target, "boxes": F.crop(boxes, *window)}, keep)


class Sanitize(nn.Module):
    """Drop boxes less than a pixel wide or high (torchvision's rule); a proposal stays while it has area."""

    def forward(self, image: tv_tensors.Image, target: dict[str, Any]) -> View:
        sound = F.sanitize_bounding_boxes(target["boxes"])[1]
        proposed = target["labels"] == PROPOSAL_LABEL
        return image, _kept(target, torch.where(proposed, box_area(target["boxes"]) > 0, sound))


def build_transforms(settings: TrainingSettings) -> v2.Compose:
    """The random views that ``settings`` ask for, from (image, {boxes, labels}) to the same.

    Boxes with a negative label (above) change no draw, and stay while any of them shows.
    """
    steps: list[nn.Module] = []
    if settings.flip:
        steps.append(v2.RandomHorizontalFlip(settings.flip))
    if settings.vertical_flip:
        steps.append(v2.RandomVerticalFlip(settings.vertical_flip))
    if settings.zoom != (1.0, 1.0):
        steps.append(RandomZoom(*settings.zoom))
    if settings.iou_crop:
        steps.append(v2.RandomApply([RandomIoUCrop()], settings.iou_crop))
        steps.append(Sanitize())
    if settings.photometric:
        strength = settings.photometric
        steps.append(v2.ColorJitter(0.5 * strength, 0.5 * strength, 0.5 * strength, 0.08 * strength))
    return v2.Compose([*steps, v2.Identity()])


def _kept(target: dict[str, Any], keep: Tensor) -> dict[str, Any]:
    kept = {name: value[keep] for name, value in target.items()}
    return {**kept, "boxes": tv_tensors.wrap(kept["boxes"], like=target["boxes"])}

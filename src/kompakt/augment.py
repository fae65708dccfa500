"""Augmentation of whole batches: pure functions of images and a generator.

Each takes images N×C×H×W of any dtype and returns new ones of the same shape and dtype; every
example draws its own values. Bind other settings with ``functools.partial``.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images: two forms of each come again and again, so that a teacher's answers can be kept.

    Args:
        images: N×C×H×W.
        generator: where the randomness comes from (on the CPU).

    Returns:
        N×C×H×W of the same dtype.
    """
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


def crop_and_flip(images: Tensor, generator: torch.Generator, *, pad: int = 4) -> Tensor:
    """Shift each image by up to ``pad`` pixels, zeros coming in, and mirror half of them.

    The augmentation of CIFAR training (He et al. 2016, arXiv 1512.03385, §4.2).

    Args:
        images: N×C×H×W.
        generator: where the randomness comes from (on the CPU).
        pad: the largest shift in pixels, in each direction.

    Returns:
        N×C×H×W of the same dtype.
    """
    n, _, height, width = images.shape
    down, right = _offsets(n, pad, generator)
    mirrored = torch.rand(n, 1, generator=generator) < 0.5
    rows = down + torch.arange(height)
    columns = right + torch.where(mirrored, torch.arange(width - 1, -1, -1), torch.arange(width))
    return _taken(F.pad(images, (pad, pad, pad, pad)), rows, columns)


def shift(images: Tensor, generator: torch.Generator, *, pad: int = 2) -> Tensor:
    """Shift each image by up to ``pad`` pixels, its border repeated: for what a mirror spoils, as digits and signs.

    LeCun et al. 1998 (LeNet-5), §III.C distorts digits so among others.

    Args:
        images: N×C×H×W.
        generator: where the randomness comes from (on the CPU).
        pad: the largest shift in pixels, in each direction.

    Returns:
        N×C×H×W of the same dtype.
    """
    n, _, height, width = images.shape
    down, right = _offsets(n, pad, generator)
    rows = (down - pad + torch.arange(height)).clamp(0, height - 1)
    return _taken(images, rows, (right - pad + torch.arange(width)).clamp(0, width - 1))


def _offsets(count: int, pad: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw how far down and right each image is taken, 0 to 2·pad, both (N, 1)."""
    down = torch.randint(2 * pad + 1, (count, 1), generator=generator)
    return down, torch.randint(2 * pad + 1, (count, 1), generator=generator)


def _taken(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Take rows (N, H) and columns (N, W) of each image."""
    example = torch.arange(len(images))[:, None, None]
    found = images.permute(0, 2, 3, 1)[example, rows[:, :, None], columns[:, None, :]]
    return found.permute(0, 3, 1, 2).contiguous()


def resized_crop_and_flip(
    images: Tensor,
    generator: torch.Generator,
    *,
    area: tuple[float, float] = (0.35, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """Zoom each image into a random part of itself and mirror half of them.

    The augmentation of ImageNet training (Szegedy et al. 2015, arXiv 1409.4842, §6), on images that
    are already of the model's size; bilinear.

    Args:
        images: N×C×H×W.
        generator: where the randomness comes from (on the CPU).
        area: smallest and largest share of the image's area that is kept.
        aspect: smallest and largest ratio of width to height, drawn uniformly in its logarithm.

    Returns:
        N×C×H×W of the same dtype.
    """
    n = len(images)
    share, ratio, x, y, coin = torch.rand(5, n, generator=generator)
    share = area[0] + (area[1] - area[0]) * share
    ratio = torch.exp(torch.log(torch.tensor(aspect[0])) * (1 - ratio) + torch.log(torch.tensor(aspect[1])) * ratio)
    wide, high = (share * ratio).sqrt().clamp(max=1), (share / ratio).sqrt().clamp(max=1)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = torch.where(coin < 0.5, -wide, wide)
    theta[:, 1, 1] = high
    theta[:, 0, 2] = (2 * x - 1) * (1 - wide)
    theta[:, 1, 2] = (2 * y - 1) * (1 - high)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    out = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return out if images.is_floating_point() else out.round().to(images.dtype)


AUGMENTATIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor] | None] = {
    "none": None,
    "flip": flip,
    "crop_and_flip": crop_and_flip,
    "shift": shift,
}
"""By the names that recipes use."""
FORMS = {"none": 1, "flip": 2}
"""How many forms of an image those give that give a few; the others make every image new."""

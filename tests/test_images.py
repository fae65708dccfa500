"""Laws of images: decoding equals torchvision's, augmentation equals a loop."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from kompakt import progress
from kompakt.augment import crop_and_flip, resized_crop_and_flip, shift
from kompakt.errors import InputError
from kompakt.images import ImageSpec, decode


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# From a file to a tensor


@pytest.mark.parametrize("size", [(40, 40), (53, 40), (31, 77), (20, 24), (32, 36)])
@pytest.mark.parametrize("resize", [None, 36])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_decoding_equals_torchvision(
    tmp_path: Path, size: tuple[int, int], resize: int | None, interpolation: str
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.jpg")
    spec = ImageSpec(input_size=32, resize=resize, interpolation=interpolation)  # type: ignore[arg-type]
    expected = transforms.Compose(
        [
            transforms.Resize(resize or 32, transforms.InterpolationMode(interpolation)),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize(spec.mean, spec.std),
        ]
    )
    with Image.open(tmp_path / "image.jpg") as image:
        wanted = expected(image.convert("RGB"))
    got = spec.normalise(torch.tensor(decode(tmp_path / "image.jpg", spec)[None]))[0]
    assert torch.equal(got, wanted)


def test_an_image_of_the_right_size_is_left_alone(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    assert np.array_equal(decode(tmp_path / "image.png", ImageSpec(input_size=32)), pixels.transpose(2, 0, 1))


def test_every_kind_of_pixel_becomes_three_channels_or_one(tmp_path: Path) -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 256 + 7).save(tmp_path / "deep.png")
    rgb = Image.fromarray(np.stack([grey] * 3, -1))
    rgb.save(tmp_path / "rgb.png")
    rgb.convert("RGBA").save(tmp_path / "alpha.png")
    rgb.convert("P", palette=Image.Palette.ADAPTIVE, colors=256).save(tmp_path / "palette.png", transparency=bytes(256))
    for name in ("grey", "deep", "rgb", "alpha", "palette"):
        three = decode(tmp_path / f"{name}.png", ImageSpec(input_size=16))
        one = decode(tmp_path / f"{name}.png", ImageSpec(input_size=16, channels=1))
        assert three.dtype == one.dtype == np.uint8
        assert np.array_equal(three, np.stack([grey] * 3)), name
        assert np.array_equal(one, grey[None]), name


def test_one_channel_takes_one_mean_or_the_average_of_three() -> None:
    images = torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)
    assert ImageSpec(channels=1, mean=(0.5,), std=(0.25,)).normalise(images)[0, 0, 0, 0] == 2
    value = ImageSpec(channels=1, mean=(0.2, 0.3, 0.4), std=(0.1, 0.2, 0.3)).normalise(images)[0, 0, 0, 0]
    assert value == pytest.approx(3.5)


@pytest.mark.parametrize(
    "options",
    [
        {"input_size": 0},
        {"resize": 8},
        {"mean": (0.5, 0.5)},
        {"std": (0.0, 1.0, 1.0)},
        {"channels": 4},
        {"interpolation": "cubic"},
    ],
)
def test_impossible_settings_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(options)).replace("_", " ")):
        ImageSpec(**{"input_size": 16} | options)  # type: ignore[arg-type]


# Augmentation


def naive_crop_and_flip(images: torch.Tensor, gen: torch.Generator, pad: int) -> torch.Tensor:
    n, _, height, width = images.shape
    down = torch.randint(2 * pad + 1, (n, 1), generator=gen)
    right = torch.randint(2 * pad + 1, (n, 1), generator=gen)
    coin = torch.rand(n, 1, generator=gen)
    out = []
    for image, y, x, c in zip(images, down, right, coin, strict=True):
        padded = torch.nn.functional.pad(image, (pad,) * 4)[:, y : y + height, x : x + width]
        out.append(padded.flip(-1) if c < 0.5 else padded)
    return torch.stack(out)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("pad", [0, 1, 4])
def test_crop_and_flip_equals_a_loop(dtype: torch.dtype, pad: int) -> None:
    images = torch.randint(1, 255, (40, 3, 8, 10), generator=generator()).to(dtype)
    before = images.clone()
    out = crop_and_flip(images, generator(5), pad=pad)
    assert torch.equal(out, naive_crop_and_flip(images, generator(5), pad))
    assert torch.equal(images, before)
    assert out.dtype == dtype


@pytest.mark.parametrize("pad", [0, 1, 3])
def test_shifts_repeat_the_border_and_mirror_nothing(pad: int) -> None:
    images = torch.randint(0, 256, (60, 2, 6, 9), generator=generator(), dtype=torch.uint8)
    out = shift(images, generator(5), pad=pad)
    draw = generator(5)
    down, right = (torch.randint(-pad, pad + 1, (60,), generator=draw) for _ in range(2))
    padded = torch.nn.functional.pad(images.float(), (pad,) * 4, mode="replicate").to(torch.uint8)
    for image, made, y, x in zip(padded, out, down + pad, right + pad, strict=True):
        assert torch.equal(made, image[:, y : y + 6, x : x + 9])
    assert {*down.tolist()} == {*right.tolist()} == {*range(-pad, pad + 1)}


def test_resized_crops_keep_size_range_and_the_whole_image_where_nothing_is_cut() -> None:
    images = torch.randint(0, 256, (40, 3, 8, 8), generator=generator(), dtype=torch.uint8)
    out = resized_crop_and_flip(images, generator(1))
    assert out.shape == images.shape
    assert out.dtype == torch.uint8
    assert not torch.equal(out, images)
    whole = resized_crop_and_flip(images, generator(1), area=(1.0, 1.0), aspect=(1.0, 1.0))
    mirrored = (whole == images.flip(-1)).flatten(1).all(1)
    assert ((whole == images).flatten(1).all(1) | mirrored).all()
    assert 0 < mirrored.sum() < 40
    constant = torch.full((4, 3, 8, 8), 77, dtype=torch.uint8)
    assert torch.equal(resized_crop_and_flip(constant, generator()), constant)  # nothing comes in from outside


# Progress


def test_progress_passes_everything_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.track(range(5), 5, "quiet")) == list(range(5))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(progress.track(range(5), 5, "fast")) == list(range(5))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "PATIENCE_S", 0.0)
    assert list(progress.track(range(5), 5, "slow")) == list(range(5))
    assert "slow" in capsys.readouterr().err

"""Single images on the host: evaluation's view, random-resized crop, prediction's input."""

import io
import math

import numpy as np
import pytest
from PIL import Image

from adderflax.data import preprocess_image
from adderflax.data.images import EvaluationView, open_image, random_crop_box, random_resized_crop


def ramp(width, height):
    """Brightness grows from left to right, and from top to bottom in the second channel."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width).round()[None, :]
    pixels[..., 1] = np.linspace(0, 255, height).round()[:, None]
    return pixels


def jpeg(pixels, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()


def test_view_leaves_an_image_of_its_size_alone():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    view = EvaluationView(8, None, 3)
    np.testing.assert_array_equal(view(open_image(pixels)), pixels)
    grey = pixels[..., :1]
    np.testing.assert_array_equal(EvaluationView(8, None, 1)(open_image(grey)), grey)


@pytest.mark.parametrize("width, height", [(96, 64), (64, 96), (65, 193)])
def test_view_resizes_the_short_side_and_crops_the_center(width, height):
    size, resize = 28, 32
    seen = EvaluationView(size, resize, 3)(open_image(ramp(width, height))).astype(float)
    assert seen.shape == (size, size, 3)
    scale = resize / min(width, height)
    for channel, length in ((0, width), (1, height)):
        line = seen[size // 2, :, 0] if channel == 0 else seen[:, size // 2, 1]
        # Pixel i of the crop looks at this place of the original.
        first = (round(length * scale) - size) / 2
        places = (first + np.arange(size) + 0.5) / scale - 0.5
        np.testing.assert_allclose(line, places / (length - 1) * 255, atol=3.5)


def test_crop_boxes_are_drawn_as_published():
    random = np.random.default_rng(0)
    width, height = 500, 400
    boxes = [random_crop_box(width, height, (0.08, 1.0), random) for _ in range(4000)]
    left, top, right, bottom = np.array(boxes).T
    assert left.min() == 0 and top.min() == 0 and right.max() == width and bottom.max() == height
    across, down = right - left, bottom - top
    area = across * down / (width * height)
    assert area.min() > 0.079 and area.max() <= 1.0
    aspect = across / down
    assert aspect.min() > 0.745 and aspect.max() < 1.345
    # Small boxes always fit: there area is uniform and the log of the aspect ratio too.
    small = area < 0.5
    assert abs(area[small].mean() - 0.29) < 0.01
    assert abs(np.log(aspect[small]).mean()) < 0.02
    assert abs(np.log(aspect[small]).std() - 2 * math.log(4 / 3) / math.sqrt(12)) < 0.01
    # Positions are uniform over where the box can be.
    assert abs((left / np.maximum(width - across, 1)).mean() - 0.5) < 0.03


def test_crop_scale_is_respected():
    random = np.random.default_rng(0)
    boxes = [random_crop_box(100, 100, (0.5, 0.6), random) for _ in range(200)]
    area = [(right - left) * (bottom - top) / 1e4 for left, top, right, bottom in boxes]
    assert 0.49 < min(area) and max(area) < 0.61


@pytest.mark.parametrize(
    "width, height, box",
    [(1000, 10, (494, 0, 507, 10)), (10, 1000, (0, 494, 10, 507)), (1, 1, (0, 0, 1, 1))],
)
def test_where_no_box_fits_the_center_is_taken(width, height, box):
    random = np.random.default_rng(0)
    drawn = random_crop_box(width, height, (0.9, 1.0), random)
    assert np.abs(np.subtract(drawn, box)).max() <= 1
    assert drawn[0] + drawn[2] == pytest.approx(width, abs=1)


def test_crop_shows_exactly_the_box():
    pixels, size = ramp(120, 90), 32
    for seed in range(20):
        box = random_crop_box(120, 90, (0.08, 1.0), np.random.default_rng(seed))
        image = random_resized_crop(open_image(pixels), size, 3, (0.08, 1.0), np.random.default_rng(seed))
        seen = np.asarray(image).astype(float)
        assert seen.shape == (size, size, 3)
        places = box[0] + (np.arange(size) + 0.5) * (box[2] - box[0]) / size - 0.5
        inner = slice(3, -3)
        np.testing.assert_allclose(seen[size // 2, inner, 0], (places / 119 * 255)[inner], atol=2.5)
        places = box[1] + (np.arange(size) + 0.5) * (box[3] - box[1]) / size - 0.5
        np.testing.assert_allclose(seen[inner, size // 2, 1], (places / 89 * 255)[inner], atol=2.5)


def test_large_jpeg_is_decoded_at_a_fraction_and_shows_the_same():
    coarse = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((1203, 901), Image.Resampling.BICUBIC))
    encoded = jpeg(pixels)
    reduced = 0
    for seed in range(12):
        opened = open_image(encoded)
        image = random_resized_crop(opened, 64, 3, (0.3, 1.0), np.random.default_rng(seed))
        reduced += opened.size[0] < 1203
        box = random_crop_box(1203, 901, (0.3, 1.0), np.random.default_rng(seed))
        whole = open_image(encoded).convert("RGB")
        whole = whole.resize((64, 64), Image.Resampling.BICUBIC, box=box)
        difference = np.abs(np.asarray(image).astype(int) - np.asarray(whole))
        assert difference.mean() < 1.0 and difference.max() <= 12
    assert reduced == 12


def test_small_crop_is_not_decoded_below_what_it_needs():
    opened = open_image(jpeg(ramp(256, 256)))
    random_resized_crop(opened, 224, 3, (0.5, 1.0), np.random.default_rng(0))
    assert opened.size == (256, 256)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "CMYK", "1"])
@pytest.mark.parametrize("channels", [1, 3])
def test_prediction_takes_any_picture(make_info, mode, channels):
    image = Image.fromarray(ramp(40, 30)).convert(mode)
    seen = preprocess_image(image, make_info(16, channels))
    assert seen.shape == (16, 16, channels) and seen.dtype == np.uint8
    assert seen.std() > 20


def test_prediction_sees_what_evaluation_sees(make_info):
    pixels = ramp(60, 45)
    expected = EvaluationView(16, 18, 3)(open_image(pixels))
    info = make_info(16, eval_resize=18)
    np.testing.assert_array_equal(preprocess_image(pixels, info), expected)
    np.testing.assert_array_equal(preprocess_image(Image.fromarray(pixels), info), expected)
    grey = pixels[..., 0]
    info = make_info(16, 1)
    np.testing.assert_array_equal(preprocess_image(grey, info), preprocess_image(grey[..., None], info))


def test_prediction_turns_photographs_upright(make_info):
    pixels = ramp(48, 48)
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    turned = Image.open(io.BytesIO(jpeg(pixels, exif=exif)))
    seen = preprocess_image(turned, make_info(48)).astype(int)
    assert np.abs(seen - pixels[::-1, ::-1]).mean() < 3


def test_sixteen_bits_are_scaled_not_clipped(make_info):
    line = np.linspace(0, 65535, 64).astype(np.uint16)
    deep = Image.fromarray(np.tile(line, (64, 1)))
    seen = preprocess_image(deep, make_info(64, 1))[..., 0]
    np.testing.assert_allclose(seen[0], np.linspace(0, 255, 64), atol=1.0)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros(4, np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        Image.new("F", (4, 4)),
    ],
)
def test_unclear_pictures_are_refused(make_info, image):
    with pytest.raises(ValueError, match="uint8"):
        preprocess_image(image, make_info(4))

"""What a saved picture says about itself, in every format and whatever the privacy level."""

import io

import numpy as np
import pytest
from PIL import ExifTags, Image

from mlx_flux_krea.errors import ResourceError, UsageError
from mlx_flux_krea.provenance import SOFTWARE, Picture, read_record

RECORD = {"software": SOFTWARE, "prompt": 'кот "猫" <b>&amp;</b> 😀\n\\u0041', "seed": 2**64 - 1, "guidance_scale": 4.5}
PIXELS = np.arange(24 * 16 * 3, dtype=np.uint8).reshape(16, 24, 3)


@pytest.fixture
def picture():
    return Picture.from_pixels(PIXELS, RECORD)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.jpeg", "a.webp", "A.PNG"])
def test_the_record_comes_back_from_every_format(picture, tmp_path, name):
    picture.save(tmp_path / name)
    assert read_record(tmp_path / name) == RECORD
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("metadata", ["full", "minimal"])
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_every_file_says_that_a_machine_made_it(picture, tmp_path, name, metadata):
    picture.save(tmp_path / name, metadata=metadata)
    with Image.open(tmp_path / name) as image:
        xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
        xmp = xmp.decode() if isinstance(xmp, bytes) else xmp
        assert "digitalsourcetype/trainedAlgorithmicMedia</" in xmp
        assert image.getexif()[ExifTags.Base.Software].startswith("AI generated;txt2img;flux")
    if metadata == "minimal":
        assert read_record(tmp_path / name) is None
        assert "кот".encode() not in (tmp_path / name).read_bytes()


def test_a_picture_from_an_image_says_so(tmp_path):
    Picture.from_pixels(PIXELS, RECORD | {"strength": 0.6}).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert "compositeWithTrainedAlgorithmicMedia" in image.info["XML:com.adobe.xmp"]
        assert image.getexif()[ExifTags.Base.Software].startswith("AI generated;img2img")


def test_png_keeps_every_pixel_and_pillows_own_options_are_obeyed(picture, tmp_path):
    picture.save(tmp_path / "a.png", compress_level=0)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), PIXELS)
    assert (tmp_path / "a.png").stat().st_size > PIXELS.size
    picture.save(tmp_path / "best.jpg")
    picture.save(tmp_path / "worst.jpg", quality=10)
    assert (tmp_path / "worst.jpg").stat().st_size < (tmp_path / "best.jpg").stat().st_size


def test_an_open_file_is_written_too(picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    assert read_record(file) == RECORD


def test_an_existing_file_is_replaced_whole_or_not_at_all(picture, tmp_path, monkeypatch):
    target = tmp_path / "a.png"
    target.write_bytes(b"before")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        with pytest.raises(ResourceError, match="is full") as caught:
            picture.save(target)
    assert caught.value.exit_code == 8
    assert target.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    picture.save(target)
    assert read_record(target) == RECORD


def test_what_cannot_be_written_is_refused(picture, tmp_path):
    with pytest.raises(UsageError, match="known format"):
        picture.save(tmp_path / "a.xyz")
    with pytest.raises(UsageError, match="cannot be written"):
        picture.save(tmp_path / "nowhere" / "a.png")
    with pytest.raises(UsageError, match="level of metadata"):
        picture.save(tmp_path / "a.png", metadata="none")
    assert list(tmp_path.iterdir()) == []


def test_other_pictures_carry_no_record(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "plain.png")
    assert read_record(tmp_path / "plain.png") is None
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UsageError, match="cannot be opened"):
        read_record(tmp_path / "text.png")


def test_copies_are_plain_images(picture):
    assert type(picture.resize((8, 8))) is Image.Image
    assert type(picture.convert("L")) is Image.Image

"""The record of a saved picture, in every format and at every privacy level."""

import copy
import io
import json
import logging
import pickle

import mlx.core as mx
import numpy as np
import pytest
from PIL import ExifTags, Image, PngImagePlugin

from mlx_flux_krea.errors import ResourceError, UsageError
from mlx_flux_krea.inputs.image import open_image
from mlx_flux_krea.provenance import SOFTWARE, Picture, a1111_parameters, read_picture, read_record

TEXT = 'кот "猫" <b>&amp;</b> ]]> 😀\n\\u0041 \x00\x01\x7f\x9f\ufffe עברית'
RECORD = {"software": SOFTWARE, "prompt": TEXT, "seed": 2**64 - 1, "guidance_scale": 4.5}
FULL = RECORD | {
    "mlx": "0.32.4", "model": "krea, 4-bit", "base": "FLUX.1 Krea [dev]", "manifest_sha256": "0123456789abcdef" * 4,
    "dtype": "bfloat16", "quantization": {"transformer": "4-bit"}, "prompt_2": "猫", "negative_prompt": "жаба: зла",
    "negative_prompt_2": "x", "true_cfg_scale": 1.5, "width": 24, "height": 16, "num_inference_steps": 2,
    "sigmas": [0.9, 0.4], "noise": "mflux", "batch": [0, 2], "strength": 0.6, "max_sequence_length": 512,
    "schedule": {"shift": "dynamic"}, "image": {"width": 9, "height": 9, "rgb_sha256": "0" * 64}, "image_seed": 3,
    "given": ["latents"], "license": "dev", "evaluations": 2, "notes": None,
}  # fmt: skip
PIXELS = np.arange(24 * 16 * 3, dtype=np.uint8).reshape(16, 24, 3)


@pytest.fixture
def picture():
    return Picture.from_pixels(PIXELS, RECORD)


def assert_marked(file) -> None:
    with Image.open(file) as image:
        xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
        xmp = xmp.decode() if isinstance(xmp, bytes) else xmp
        assert "digitalsourcetype/trainedAlgorithmicMedia</" in xmp
        assert image.getexif()[ExifTags.Base.Software].startswith("AI generated;txt2img;flux")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.jpeg", "a.webp", "A.PNG"])
def test_the_record_comes_back_from_every_format(picture, tmp_path, name):
    picture.save(tmp_path / name)
    assert read_record(tmp_path / name) == RECORD
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_every_field_comes_back_from_every_place(tmp_path, name):
    Picture.from_pixels(PIXELS, FULL).save(tmp_path / name)
    read = read_picture(tmp_path / name)
    assert read["record"] == FULL
    assert read["source_type"] == "compositeWithTrainedAlgorithmicMedia"
    assert read["software"] == f"AI generated;img2img;flux; {SOFTWARE}"
    assert read["parameters"] == (
        f"{TEXT}\nNegative prompt: жаба: зла\nSteps: 2, Sampler: Euler, CFG scale: 1.5, Distilled CFG Scale: 4.5, "
        f'Seed: {2**64 - 1}, Size: 24x16, Model hash: 0123456789, Model: "krea, 4-bit", Denoising strength: 0.6, '
        f"Version: {SOFTWARE}"
    )
    with Image.open(tmp_path / name) as image:
        exif = image.getexif()
        comment = exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
        assert exif.endian == ">"
    assert comment == b"UNICODE\0" + read["parameters"].encode("utf-16-be")


@pytest.mark.slow
def test_every_field_that_a_picture_has_is_among_them_and_comes_back(pipe, tmp_path):
    size = {"width": 48, "height": 32, "num_inference_steps": 1}
    texts = {"prompt_2": "кот", "negative_prompt": "猫", "negative_prompt_2": "x", "true_cfg_scale": 1.5}
    image = {"image": Image.new("RGB", (48, 32), "red"), "strength": 1.0, "sigmas": [0.9]}
    calls = (
        {"prompt": TEXT, **texts, **image, "seed": [1, 2], "num_images_per_prompt": 2},
        {"prompt": TEXT, "seed": 1, "num_images_per_prompt": 2},
        {"prompt": TEXT, "latents": mx.zeros((1, 6, 64))},
    )
    pictures = [picture for call in calls for picture in pipe(**call, **size).images]
    assert {name for picture in pictures for name in picture.record} | {"notes"} == FULL.keys()
    for picture in pictures:
        for name in ("a.png", "a.jpg", "a.webp"):
            picture.save(tmp_path / name)
            assert read_record(tmp_path / name) == json.loads(json.dumps(picture.record))


def test_parameters_need_no_more_than_there_is():
    assert a1111_parameters({"software": "x", "prompt": "a"}) == "a\nSampler: Euler, CFG scale: 1, Version: x"


@pytest.mark.parametrize("metadata", ["full", "minimal"])
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_every_file_says_that_a_machine_made_it(picture, tmp_path, name, metadata):
    picture.save(tmp_path / name, metadata=metadata)
    assert_marked(tmp_path / name)
    if metadata == "minimal":
        read = read_picture(tmp_path / name)
        assert (read["record"], read["parameters"]) == (None, None)
        data = (tmp_path / name).read_bytes()
        assert not any("кот".encode(code) in data for code in ("utf-8", "utf-16-be", "utf-16-le", "unicode_escape"))


def test_a_picture_from_an_image_says_so(tmp_path):
    image = {"width": 4, "height": 4, "rgb_sha256": "0" * 64}
    Picture.from_pixels(PIXELS, RECORD | {"image": image}).save(tmp_path / "a.png")
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
    picture.save(tmp_path / "lossless.webp", lossless=True)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "lossless.webp")), PIXELS)


def test_a_quality_that_is_none_or_does_nothing_is_refused(picture, tmp_path):
    for name, quality in (("a.png", 90), ("a.jpg", 0), ("a.webp", 101), ("a.jpg", "90"), ("a.jpg", True)):
        with pytest.raises(UsageError, match="quality"):
            picture.save(tmp_path / name, quality=quality)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["PNG", "png", "Jpeg", "webp"])
def test_an_open_file_is_written_too_whatever_the_case_of_its_format(picture, format):
    upper, file = io.BytesIO(), io.BytesIO()
    picture.save(file, format)
    picture.save(upper, format.upper())
    assert file.getvalue() == upper.getvalue()  # quality too
    assert read_record(file) == RECORD
    assert_marked(file)


@pytest.mark.parametrize("as_bytes", [True, False])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_exif_of_ones_own_is_written_beside_the_marker(picture, format, as_bytes):
    exif, file = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Artist] = "somebody"
    exif[ExifTags.Base.Software] = "something else"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"ASCII\0\0\0mine"
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSMapDatum] = "WGS-84"
    exif.endian = "<"  # and ours is ">"
    picture.save(file, format, exif=exif.tobytes() if as_bytes else exif)
    assert_marked(file)
    assert read_record(file) == RECORD
    with Image.open(file) as image:
        assert image.getexif()[ExifTags.Base.Artist] == "somebody"
        assert image.getexif().get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSMapDatum] == "WGS-84"
    assert exif[ExifTags.Base.Software] == "something else"  # the caller's own stays as it is


def test_png_texts_of_ones_own_are_written_beside_the_marker(picture):
    info, file = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_text("Comment", "mine")
    info.add_text("flux-krea", "{}")
    info.add_text("parameters", "theirs")
    info.add_itxt("XML:com.adobe.xmp", "<x/>")
    picture.save(file, "PNG", pnginfo=info)
    assert_marked(file)
    assert read_record(file) == RECORD
    with Image.open(file) as image:
        assert image.info["Comment"] == "mine"
    for theirs in (b"<x/>", b"theirs"):
        assert theirs not in file.getvalue()  # for readers that take the first of two
    assert len(info.chunks) == 4


def test_the_marker_cannot_be_replaced(picture):
    with pytest.raises(UsageError, match="`xmp` is given"):
        picture.save(io.BytesIO(), "WEBP", xmp=b"<x/>")


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "ICO", "PPM", "TGA", "JPEG2000"])
def test_formats_that_cannot_carry_the_marker_are_refused(picture, tmp_path, format):
    for arguments in ((tmp_path / f"a.{format.lower()}",), (tmp_path / "a.png", format), (io.BytesIO(), format)):
        with pytest.raises(UsageError, match=r"cannot hold the record .* one of \.png"):
            picture.save(*arguments)
    with pytest.raises(UsageError, match="the name ''"):
        picture.save(io.BytesIO())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("twin", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p)), Picture.copy])
def test_whole_copies_keep_the_record(picture, twin):
    other, file = twin(picture), io.BytesIO()
    assert (type(other), other.record) == (Picture, RECORD)
    assert np.array_equal(np.asarray(other), PIXELS)
    other.save(file, "PNG")
    assert read_record(file) == RECORD


def test_a_record_too_long_for_a_jpeg_is_cut_and_says_so(tmp_path, caplog):
    """Whatever the text: UTF-8 writes a Cyrillic letter with two bytes, an emoji with four."""
    for text in ("word " * 16_000, "кот" * 30_000, "😀" * 19_000, "&" * 30_000):
        record = RECORD | {"prompt": text, "negative_prompt": "short"}
        exif = Image.Exif()
        exif[ExifTags.Base.Artist] = "a" * 1000
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            Picture.from_pixels(PIXELS, record).save(tmp_path / "a.jpg", exif=exif)
        assert "texts were cut" in caplog.text
        assert_marked(tmp_path / "a.jpg")
        kept = read_record(tmp_path / "a.jpg")
        assert text.startswith(kept["prompt"])
        assert len(kept["prompt"].replace("&", "&amp;").encode()) > 50_000
        assert kept == record | {"prompt": kept["prompt"], "truncated": True}
    for name in ("a.png", "a.webp"):
        Picture.from_pixels(PIXELS, record).save(tmp_path / name)
        assert read_record(tmp_path / name) == record


def test_hostile_files_are_no_pictures_and_large_ones_are(tmp_path, monkeypatch, recwarn):
    Image.new("L", (64, 64)).save(tmp_path / "bomb.png")
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 16)
        with pytest.raises(UsageError, match=r"bomb\.png cannot be opened: it is far too large"):
            read_record(tmp_path / "bomb.png")
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 63)
        assert read_record(tmp_path / "bomb.png") is None
        assert open_image(tmp_path / "bomb.png").size == (64, 64)
    assert not recwarn.list
    Image.new("L", (4, 4)).save(tmp_path / "exif.png", exif=b"Exif\0\0II\x99\0junk")
    with pytest.raises(UsageError, match=r"exif\.png cannot be opened"):
        read_record(tmp_path / "exif.png")
    info = PngImagePlugin.PngInfo()
    info.add_text("flux-krea", "[" * 100_000)
    Image.new("L", (4, 4)).save(tmp_path / "deep.png", pnginfo=info)
    assert read_record(tmp_path / "deep.png") is None
    Image.new("L", (4, 4)).save(tmp_path / "deep.webp", xmp=b"<krea:Record>" + b"[" * 100_000 + b"</krea:Record>\xff")
    assert read_record(tmp_path / "deep.webp") is None


def test_an_existing_file_is_replaced_whole_or_not_at_all(picture, tmp_path, monkeypatch):
    target = tmp_path / "a.png"
    target.write_bytes(b"before")

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(ResourceError, match="is full") as caught:
            picture.save(target)
    assert caught.value.exit_code == 8
    assert target.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    picture.save(target)
    assert read_record(target) == RECORD


def test_what_cannot_be_written_is_refused(picture, tmp_path):
    with pytest.raises(UsageError, match="cannot hold the record"):
        picture.save(tmp_path / "a.xyz")
    with pytest.raises(UsageError, match="cannot be written"):
        picture.save(tmp_path / "nowhere" / "a.png")
    with pytest.raises(UsageError, match="`metadata` is 'none'"):
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

"""Input images: colours by their profile, photos of telephones, texts and profiles of any size within a bound."""

import io
import struct
import sys
import warnings
import zlib

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image, ImageCms, TiffImagePlugin

from mlx_flux_krea.errors import UsageError
from mlx_flux_krea.inputs.image import open_image

HEIC = ROOT / "tests" / "data" / "images" / "gradient.heic"  # 96 x 64: red grows to the right, green downwards
P3 = np.array([[0.51512, 0.24120, -0.00105], [0.29198, 0.69225, 0.04189], [0.15710, 0.06657, 0.78407]])  # XYZ, D50
SRGB = np.array([[0.43607, 0.22249, 0.01392], [0.38515, 0.71687, 0.09708], [0.14307, 0.06061, 0.71410]])
COLOURS = np.array([[[100, 200, 100], [200, 120, 90], [40, 60, 180], [255, 255, 255], [0, 0, 0]]], np.uint8)


def profile(primaries=P3, gamma: float = 2.2, space: bytes = b"RGB ", padding: int = 0) -> bytes:
    """An ICC profile of version 2 with these primaries, or of grey."""

    def xyz(values) -> bytes:
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))

    name = b"a wide one"
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name + b"\0" + bytes(78 + 1 + padding)}
    tags[b"wtpt"] = xyz((0.9642, 1, 0.8249))
    if space == b"RGB ":
        tags |= {channel + b"XYZ": xyz(row) for channel, row in zip((b"r", b"g", b"b"), primaries, strict=True)}
        tags |= {channel + b"TRC": curve for channel in (b"r", b"g", b"b")}
    else:
        tags[b"kTRC"] = curve
    place, table, data = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for tag, value in tags.items():
        value += bytes(-len(value) % 4)
        table += tag + struct.pack(">2I", place + len(data), len(value))
        data += value
    head = struct.pack(">I4sI4s4s4s", 0, b"lcms", 0x02100000, b"mntr", space, b"XYZ ") + bytes(12) + b"acsp"
    head = head.ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061)
    whole = head.ljust(128, b"\0") + table + data
    return struct.pack(">I", len(whole)) + whole[4:]


def expected(pixels: np.ndarray) -> np.ndarray:
    """Colours of the wide profile in sRGB, by the matrices and curves of both."""
    linear = (pixels / 255) ** 2.2 @ P3 @ np.linalg.inv(SRGB)
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("as_path", [True, False])
def test_colours_of_a_wide_profile_are_converted(tmp_path, kind, as_path):
    lossless = {"lossless": True} if kind == "WEBP" else {}
    Image.fromarray(COLOURS).save(tmp_path / "a", kind, icc_profile=profile(), **lossless)
    if as_path:
        made = open_image(tmp_path / "a")
    else:
        with Image.open(tmp_path / "a") as image:
            image.load()
            made = open_image(image)
    assert np.abs(np.asarray(made).astype(int) - expected(COLOURS)).max() < 2
    assert np.abs(np.asarray(made).astype(int) - COLOURS).max() > 10


def test_an_image_in_memory_that_has_a_profile_is_converted_once():
    image = Image.fromarray(COLOURS)
    image.info["icc_profile"] = profile()
    made = open_image(image)
    assert np.abs(np.asarray(made).astype(int) - expected(COLOURS)).max() < 2
    assert open_image(made) is made


def test_transparency_keeps_its_place_beside_a_profile(tmp_path):
    rgba = np.concatenate([COLOURS, np.array([[[255], [0], [255], [255], [128]]], np.uint8)], axis=-1)
    Image.fromarray(rgba).save(tmp_path / "a.png", icc_profile=profile())
    made = np.asarray(open_image(tmp_path / "a.png")).astype(int)[0]
    theirs = expected(COLOURS)[0]
    assert np.abs(made[[0, 2, 3]] - theirs[[0, 2, 3]]).max() < 2
    assert made[1].tolist() == [255] * 3
    assert np.abs(made[4] - 127).max() <= 1


def test_greys_and_inks_have_profiles_too(tmp_path):
    grey = Image.fromarray(np.array([[0, 64, 128, 255]], np.uint8))
    grey.save(tmp_path / "a.png", icc_profile=profile(gamma=1.0, space=b"GRAY"))
    made = np.asarray(open_image(tmp_path / "a.png"))[0, :, 0].astype(int)
    assert np.abs(made - [0, 137, 188, 255]).max() <= 2  # linear greys, through sRGB's curve
    grey.convert("LA").save(tmp_path / "b.png", icc_profile=profile(gamma=1.0, space=b"GRAY"))
    assert np.array_equal(np.asarray(open_image(tmp_path / "b.png")), np.asarray(open_image(tmp_path / "a.png")))


def test_srgb_changes_no_bit_and_a_profile_of_another_kind_none(tmp_path, caplog):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for n, given in enumerate((srgb, profile(space=b"GRAY"))):
        Image.fromarray(COLOURS).save(tmp_path / f"{n}.png", icc_profile=given)
        assert np.array_equal(np.asarray(open_image(tmp_path / f"{n}.png")), COLOURS)
    assert not caplog.records


@pytest.mark.parametrize("broken", [b"not a profile", profile()[:200], profile().replace(b"RGB ", b"Luv ", 1)])
def test_a_profile_that_cannot_be_used_is_said_and_passed_over(tmp_path, caplog, broken):
    Image.fromarray(COLOURS).save(tmp_path / "a.png", icc_profile=broken)
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png")), COLOURS)
    (record,) = caplog.records
    assert f"the colour profile of {tmp_path / 'a.png'} cannot be used" in record.getMessage()


def with_chunk(path, kind: bytes, data: bytes) -> None:
    """Adds a chunk to a PNG, before its pixels."""
    whole = path.read_bytes()
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    path.write_bytes(whole[:33] + chunk + whole[33:])


def test_texts_and_profiles_of_some_megabytes_are_read_and_larger_ones_refused_in_words(tmp_path):
    for name, kind, start in (("text", b"zTXt", b"note\0\0"), ("profile", b"iCCP", b"wide\0\0")):
        for megabytes in (3, 20):
            path = tmp_path / f"{name}-{megabytes}.png"
            Image.fromarray(COLOURS).save(path)
            content = bytes(megabytes << 20) if kind == b"zTXt" else profile(padding=megabytes << 20)
            with_chunk(path, kind, start + zlib.compress(content))
            if megabytes == 3:
                assert open_image(path).size == (5, 1)
            else:
                with pytest.raises(UsageError, match="text or colour profile in it is larger than 16 MiB"):
                    open_image(path)


# --- HEIC ---


def test_a_photo_of_a_telephone_is_read_where_the_extra_is_installed(tmp_path):
    pytest.importorskip("pi_heif")
    renamed = tmp_path / "photo.jpg"
    renamed.write_bytes(HEIC.read_bytes())
    for path in (HEIC, renamed):
        made = np.asarray(open_image(path)).astype(int)
        assert made.shape == (64, 96, 3)
        red, green = np.arange(96) * 255 / 95, np.arange(64) * 255 / 63
        assert np.abs(made[:, :, 0] - red).mean() < 6
        assert np.abs(made[:, :, 1] - green[:, None]).mean() < 6


def test_without_the_extra_the_answer_says_both_ways(monkeypatch):
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    with pytest.raises(UsageError, match=r"it is HEIC or AVIF; .*sips -s format jpeg .*mlx-flux-krea\[heic\]"):
        open_image(HEIC)


def test_a_broken_heic_is_one_error(tmp_path):
    pytest.importorskip("pi_heif")
    (tmp_path / "a.heic").write_bytes(HEIC.read_bytes()[:600])
    with pytest.raises(UsageError, match="cannot be opened"):
        open_image(tmp_path / "a.heic")


# --- RAW files of cameras ---


def tiff(**tags) -> bytes:
    """A TIFF file of one page, with more tags."""
    info, file = TiffImagePlugin.ImageFileDirectory_v2(), io.BytesIO()
    for tag, value in tags.items():
        info[int(tag.lstrip("t"))] = value
    Image.fromarray(COLOURS).save(file, "TIFF", tiffinfo=info)
    return file.getvalue()


CR2 = b"II*\0\x10\0\0\0CR\x02\0" + bytes(60)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((f"DSC_1{ending}", tiff()) for ending in (".NEF", ".nef", ".cr2", ".Dng", ".arw", ".raf", ".orf", ".rw2")),
        *((f"a{ending}", tiff()) for ending in (".pef", ".srw", ".3fr", ".nrw", ".raw")),
        ("a.cr3", b"\0\0\0\x18ftypcrx " + bytes(60)),
        ("a.nef", b""),
        ("a.nef", tiff()[:90]),
        ("a.rw2", b"MM\0*" + bytes(60)),
        ("a.tif", CR2),
        ("a.jpg", b"\0\0\0\x18ftypcrx " + bytes(60)),
        *(("a.tif", start + bytes(60)) for start in (b"FUJIFILMCCD-RAW ", b"IIU\0", b"IIRO", b"IIRS", b"MMOR")),
        ("a.tif", tiff(t50706=b"\1\4\0\0")),
        ("a.tiff", tiff(t254=1, t330=(8,))),
        ("a.png", tiff(t33422=b"\0\1\1\2")),
    ],
)
def test_a_raw_file_is_named_and_never_read_as_its_preview(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=r"it is a RAW file of a camera; expected a PNG.*sips -s format jpeg"):
        open_image(tmp_path / name)


def test_other_formats_are_read_whatever_their_names_and_tiff_pages_too(tmp_path):
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF"):
        Image.fromarray(COLOURS).save(tmp_path / "a.nef", kind)
        assert open_image(tmp_path / "a.nef").size == (5, 1)
    for content in (tiff(), tiff(t254=0), tiff(t254=2)):
        (tmp_path / "a.tif").write_bytes(content)
        assert np.array_equal(np.asarray(open_image(tmp_path / "a.tif")), COLOURS)


def test_broken_files_give_one_error_and_no_warning_of_another_library(tmp_path, recwarn, capfd):
    exif = Image.Exif()
    exif[271] = "maker"
    Image.fromarray(COLOURS).save(tmp_path / "whole.jpg", exif=exif)
    jpeg, page = (tmp_path / "whole.jpg").read_bytes(), tiff(t271="maker")
    warnings.simplefilter("always")
    for name, content in (("a.tif", page), ("a.nef", page), ("a.jpg", jpeg), ("a.png", page)):
        for end in range(8, len(content), 7):
            for part in (content[:end], content[:end] + bytes(len(content) - end)):
                (tmp_path / name).write_bytes(part)
                try:
                    open_image(tmp_path / name)
                except UsageError:
                    continue
    assert [str(one.message) for one in recwarn.list] == []
    assert capfd.readouterr().err == ""

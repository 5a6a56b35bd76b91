"""The record of a picture: what made it, written into the file and read back.

Every file says that a machine made it, whatever else it says: IPTC's digital source type in XMP, and EXIF Software as
black-forest-labs/flux writes it. With `metadata="full"` (the default) it also carries the record, a JSON object of
everything that decides the picture. Formats that cannot carry both are refused.
"""

import contextlib
import errno
import json
import logging
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

from PIL import ExifTags, Image, PngImagePlugin

from . import __version__
from .errors import ResourceError, UsageError

logger = logging.getLogger("mlx_flux_krea")

SOFTWARE = f"mlx-flux-krea {__version__}"
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
LEVELS = ("full", "minimal")
_KEY = "flux-krea"  # of the JSON text in a PNG
_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/"
_XMP_KEY = "XML:com.adobe.xmp"  # of XMP in a PNG
_JPEG_EXIF = 65533  # bytes that a JPEG has for EXIF
_ASCII = b"ASCII\0\0\0"  # EXIF's mark of the character code of a UserComment
_XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">
   <xmp:CreatorTool>{tool}</xmp:CreatorTool>
   <Iptc4xmpExt:DigitalSourceType>{source_type}</Iptc4xmpExt:DigitalSourceType>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>"""


class Picture(Image.Image):
    """A PIL image that keeps its record: `save` writes it, where plain Pillow would drop it.

    Whole copies (`copy`, `copy.deepcopy`, pickle) keep it too; what PIL makes of it (`resize`, `crop`, ...) are plain
    images.
    """

    record: dict

    @classmethod
    def from_pixels(cls, pixels, record: dict) -> "Picture":
        """A picture of (H, W, 3) uint8 pixels, or of an RGB image, with its record."""
        picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
        picture.__class__ = cls
        picture.record = record
        return picture

    def save(self, fp, format: str | None = None, *, metadata: str = "full", force: bool = True, **params) -> None:
        """Saves as PNG, JPEG (quality 95, 4:4:4) or WebP (quality 95).

        Args:
            fp: a path, or a file open for writing. A path gets its name only when the file is complete.
            format: "PNG", "JPEG" or "WEBP"; None: from the ending of the path.
            metadata: "full", or "minimal": only that a machine made it.
            force: a file that stands at the path is replaced.
            params: Pillow's own, over the defaults. What `exif` and `pnginfo` hold is written beside ours.

        Raises:
            UsageError: a format or a level that is not known, a path that cannot be written, or `xmp`, which is ours.
            FileExistsError: without `force`, the path is taken.
            ResourceError: the disk is full.
        """
        if metadata not in LEVELS:
            raise UsageError(f'no level of metadata is called "{metadata}"', f"one of {', '.join(LEVELS)}")
        is_file = hasattr(fp, "write")
        name = str(getattr(fp, "name", "")) if is_file else os.fspath(fp)
        format = format.upper() if format else FORMATS.get(Path(name).suffix.lower())
        if format not in FORMATS.values():
            what = f"the format {format}" if format else f"the name {name!r}"
            raise UsageError(f"{what} is none that keeps the record of a picture", f"one of {', '.join(FORMATS)}")
        params = _parameters(format, self.record, metadata, **params)
        with contextlib.nullcontext(fp) if is_file else replacing(Path(fp), force) as file:
            super().save(file, format, **params)

    def enlarged(self, times: int) -> "Picture":
        """The picture so many times as wide and as high, smoothed; its record says so."""
        size = (self.width * times, self.height * times)
        pixels = self.resize(size, Image.Resampling.BICUBIC)
        return Picture.from_pixels(pixels, self.record | {"enlarged": times})

    def copy(self) -> "Picture":
        """The same picture with the same record."""
        picture = super().copy()
        picture.__class__ = Picture
        picture.record = dict(self.record)
        return picture

    __copy__ = copy

    def __getstate__(self) -> list:
        return [super().__getstate__(), self.record]

    def __setstate__(self, state: list) -> None:
        super().__setstate__(state[0])
        self.record = state[1]


@contextlib.contextmanager
def replacing(path: Path, force: bool = True):
    """A file open for writing that takes its name when it is complete, and leaves nothing otherwise.

    Raises:
        FileExistsError: without `force`, the name is taken, also where it was free when the block began.
        UsageError: the path cannot be written.
        ResourceError: the disk is full.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_native_id()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if not force:
            _claim(partial, path)
        os.replace(partial, path)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"the disk of {path} is full", "", "make room, or choose another place") from None
        raise UsageError(f"{path} cannot be written: {error.strerror or error}", "", "choose another place") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _claim(partial: Path, path: Path) -> None:
    """Gives the file its name where nobody has it: a second link, or where disks have none (exFAT), an empty file."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError:
        open(path, "xb").close()


@contextlib.contextmanager
def opened(image: Image.Image | str | os.PathLike) -> Iterator[Image.Image]:
    """An image or an image file, open within the block, with one error for all that can be wrong with it.

    Raises:
        UsageError: not an image, or broken.
    """
    is_path = not isinstance(image, Image.Image)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # twice as many pixels are an error
            with Image.open(image) if is_path else contextlib.nullcontext(image) as file:
                yield file
    except UsageError:
        raise
    except Exception as error:  # on hostile files Pillow and its decoders raise what they like
        reason = " ".join(str(error).split()) or type(error).__name__
        name = image if is_path else "the image"
        raise UsageError(f"{name} cannot be opened: {reason}", "an image") from None


def read_record(path: Path) -> dict | None:
    """The record in a picture's file; None where it has none.

    Raises:
        UsageError: not an image.
    """
    with opened(path) as image:
        text = image.info.get(_KEY)
        comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    if text is None and isinstance(comment, bytes) and comment.startswith(_ASCII):
        text = comment[len(_ASCII) :].decode("ascii", "replace")
    try:
        record = json.loads(text) if text else None
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and "software" in record else None


def _parameters(format: str, record: dict, metadata: str, exif=None, pnginfo=None, **params) -> dict:
    """Pillow's save parameters that carry marker and record, the caller's own beside them."""
    if "xmp" in params:
        raise UsageError("xmp is given", "none: it says that a machine made the picture")
    from_image = record.get("strength") is not None
    source_type = "compositeWithTrainedAlgorithmicMedia" if from_image else "trainedAlgorithmicMedia"
    xmp = _XMP.format(tool=escape(SOFTWARE), source_type=_SOURCE_TYPE + source_type)
    merged = Image.Exif()
    if exif:
        merged.load(exif if isinstance(exif, bytes) else exif.tobytes())
    merged[ExifTags.Base.Software] = f"AI generated;{'img2img' if from_image else 'txt2img'};flux; {SOFTWARE}"
    if format == "PNG":
        info = PngImagePlugin.PngInfo()
        ours = tuple(key.encode() + b"\0" for key in (_XMP_KEY, _KEY))
        info.chunks = [chunk for chunk in pnginfo.chunks if not chunk[1].startswith(ours)] if pnginfo else []
        info.add_itxt(_XMP_KEY, xmp)
        if metadata == "full":
            info.add_itxt(_KEY, json.dumps(record, ensure_ascii=False))
        return {**params, "pnginfo": info, "exif": merged}
    if metadata == "full":
        room = _JPEG_EXIF - len(merged.tobytes()) - 64 if format == "JPEG" else None  # 64: what leads to the comment
        merged.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = _ASCII + _fitting(record, room)
    quality = {"quality": 95, "subsampling": 0} if format == "JPEG" else {"quality": 95}
    return {**quality, **params, "exif": merged, "xmp": xmp.encode()}


def _fitting(record: dict, room: int | None) -> bytes:
    """The record as ASCII JSON of at most `room` bytes; where it is longer, texts are cut and "truncated" is true."""
    text = json.dumps(record)
    if room is None or len(text) <= room:
        return text.encode("ascii")
    texts = {name: value for name, value in record.items() if isinstance(value, str)}
    keep = max(map(len, texts.values()), default=0)
    while len(text) > room and keep:
        keep = keep * 9 // 10
        text = json.dumps(record | {name: value[:keep] for name, value in texts.items()} | {"truncated": True})
    logger.warning("a JPEG has no room for the whole record: its texts were cut; PNG and WebP keep them")
    return text.encode("ascii")

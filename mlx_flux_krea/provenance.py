"""The record of a picture: what made it, written into the file and read back.

Every file says that a machine made it, whatever else it says: IPTC's digital source type in XMP, and EXIF Software as
black-forest-labs/flux writes it. With `metadata="full"` (the default) it also carries the record, a JSON object of
everything that decides the picture.
"""

import contextlib
import json
import os
from pathlib import Path
from xml.sax.saxutils import escape

from PIL import ExifTags, Image, PngImagePlugin

from . import __version__
from .errors import ResourceError, UsageError

SOFTWARE = f"mlx-flux-krea {__version__}"
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
LEVELS = ("full", "minimal")
_KEY = "flux-krea"  # of the JSON text in a PNG
_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/"
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

    Copies that PIL makes (`resize`, `crop`, ...) are plain images.
    """

    record: dict

    @classmethod
    def from_pixels(cls, pixels, record: dict) -> "Picture":
        """A picture of (H, W, 3) uint8 pixels with its record."""
        picture = Image.fromarray(pixels)
        picture.__class__ = cls
        picture.record = record
        return picture

    def save(self, fp, format: str | None = None, *, metadata: str = "full", **params) -> None:
        """Saves as PNG, JPEG (quality 95, 4:4:4) or WebP (quality 95), in other formats as Pillow does.

        Args:
            fp: a path, or a file open for writing. A path gets its name only when the file is complete.
            format: as Pillow; None: from the ending of the path.
            metadata: "full", or "minimal": only that a machine made it.
            params: Pillow's own, over the defaults.

        Raises:
            UsageError: an unknown level, or a path that cannot be written.
            ResourceError: the disk is full.
        """
        if metadata not in LEVELS:
            raise UsageError(f'no level of metadata is called "{metadata}"', f"one of {', '.join(LEVELS)}")
        if hasattr(fp, "write"):
            format = format or FORMATS.get(Path(getattr(fp, "name", "")).suffix.lower())
            super().save(fp, format, **{**_parameters(format, self.record, metadata), **params})
            return
        path = Path(fp)
        format = format or FORMATS.get(path.suffix.lower()) or Image.registered_extensions().get(path.suffix.lower())
        if not format:
            raise UsageError(f"{path} does not end in a known format", f"one of {', '.join(FORMATS)}")
        with replacing(path) as file:
            super().save(file, format, **{**_parameters(format, self.record, metadata), **params})


@contextlib.contextmanager
def replacing(path: Path):
    """A file open for writing that takes its name when it is complete, and leaves nothing otherwise.

    Raises:
        UsageError: the path cannot be written.
        ResourceError: the disk is full.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        if error.errno == 28:  # ENOSPC
            raise ResourceError(f"the disk of {path} is full", "", "make room, or choose another place") from None
        raise UsageError(f"{path} cannot be written: {error.strerror}", "", "choose another place") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def read_record(path: Path) -> dict | None:
    """The record in a picture's file; None where it has none.

    Raises:
        UsageError: not an image.
    """
    try:
        with Image.open(path) as image:
            text = image.info.get(_KEY)
            comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    except (OSError, SyntaxError, ValueError) as error:
        raise UsageError(f"{path} cannot be opened: {error}", "an image") from None
    if text is None and isinstance(comment, bytes) and comment.startswith(_ASCII):
        text = comment[len(_ASCII) :].decode("ascii", "replace")
    try:
        record = json.loads(text) if text else None
    except ValueError:
        return None
    return record if isinstance(record, dict) and "software" in record else None


def _parameters(format: str | None, record: dict, metadata: str) -> dict:
    """Pillow's save parameters that carry marker and record."""
    from_image = record.get("strength") is not None
    software = f"AI generated;{'img2img' if from_image else 'txt2img'};flux; {SOFTWARE}"
    source_type = "compositeWithTrainedAlgorithmicMedia" if from_image else "trainedAlgorithmicMedia"
    xmp = _XMP.format(tool=escape(SOFTWARE), source_type=_SOURCE_TYPE + source_type)
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = software
    if format == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", xmp)
        if metadata == "full":
            info.add_itxt(_KEY, json.dumps(record, ensure_ascii=False))
        return {"pnginfo": info, "exif": exif}
    if metadata == "full":
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = _ASCII + json.dumps(record).encode("ascii")
    if format == "JPEG":
        return {"exif": exif, "xmp": xmp.encode(), "quality": 95, "subsampling": 0}
    if format == "WEBP":
        return {"exif": exif, "xmp": xmp.encode(), "quality": 95}
    return {"exif": exif}

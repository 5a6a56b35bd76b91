"""The record of a picture: its prompt, seed, model and settings, written into the file and read back.

Every file says that a machine made it, whatever else it says: IPTC's digital source type in XMP, and EXIF Software as
black-forest-labs/flux writes it. With `metadata="full"` (the default) it also carries all that decides the picture:

    the record as JSON     PNG: the text "flux-krea"; JPEG and WebP: in XMP, under a namespace of ours
    A1111's `parameters`   PNG: the text of that name; all formats: EXIF UserComment, as UTF-16

Formats that cannot carry all this are refused.
"""

import contextlib
import copy
import io
import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from html import escape, unescape  # those of xml.sax bring all of urllib
from pathlib import Path
from typing import Any, BinaryIO, Self

from PIL import ExifTags, Image, JpegImagePlugin, PngImagePlugin, UnidentifiedImageError

from . import __version__
from .credentials import signing
from .errors import CredentialsError, UsageError, printable
from .files import open_regular, parse_json, replacing
from .presets import MAX_PIXELS, METADATA, QUALITY

logger = logging.getLogger("mlx_flux_krea")
logging.getLogger("PIL").addHandler(logging.NullHandler())  # else its errors go to standard error beside ours

SOFTWARE = f"mlx-flux-krea {__version__}"
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
PngImagePlugin.MAX_TEXT_CHUNK = 2**24  # bytes of a text or a colour profile; Pillow's own megabyte refuses real ones
READ = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")  # Pillow's names of the formats that are read
_EXPECTED = "a PNG, JPEG, WebP, TIFF, BMP or GIF"
_HEIF = {b"heic", b"heix", b"hevc", b"heim", b"heis", b"hevm", b"mif1", b"msf1", b"avif", b"avis"}  # brands
_RAW = {".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".fff", ".iiq", ".kdc", ".mef", ".mos", ".mrw"}
_RAW |= {".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f"}  # of cameras
_RAW_STARTS = (
    b"FUJIFILMCCD-RAW",
    b"IIU\0",
    b"IIRO",
    b"IIRS",
    b"MMOR",
    b"\0MRM",
    b"FOVb",
)  # of RAW files that are no TIFF
_NO_RAW_STARTS = (b"\x89PNG", b"\xff\xd8", b"RIFF", b"BM", b"GIF8")  # of what may have a RAW file's name
_DNG_VERSION, _SUBFILE_TYPE, _SUB_IFDS, _CFA_PATTERN = 0xC612, 0x00FE, 0x014A, 0x828E  # tags of TIFF
_SIPS = "convert it first; on a Mac: sips -s format jpeg IN --out OUT.jpg"
SIGNED = {"credentials": True}  # in the record of a signed file: a copy without them has lost them
_KEY = "flux-krea"  # of the JSON text in a PNG
_A1111_KEY = "parameters"  # of A1111's text in a PNG
_XMP_KEY = "XML:com.adobe.xmp"  # of XMP in a PNG
_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/"
_UNICODE, _ASCII = b"UNICODE\0", b"ASCII\0\0\0"  # EXIF's marks of the character code of a UserComment
_JPEG_EXIF, _JPEG_XMP = 65533, 65504  # bytes of room in a JPEG
_RECORD = re.compile("<krea:Record>(.*?)</krea:Record>", re.DOTALL)
_NO_XML = re.compile("[\x7f-\x9f\ud800-\udfff\ufffe\uffff]")  # JSON escapes all others that XML cannot hold
_XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" xmlns:krea="urn:mlx-flux-krea:record/">
   <xmp:CreatorTool>{tool}</xmp:CreatorTool>
   <Iptc4xmpExt:DigitalSourceType>{source_type}</Iptc4xmpExt:DigitalSourceType>{record}
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>"""


class Picture(Image.Image):
    """A PIL image with its record: `save` writes it, where plain Pillow would drop it.

    Whole copies (`copy`, `copy.deepcopy`, pickle) have it too; results of PIL's methods (`resize`, `crop`, ...) are
    plain images without.
    """

    record: dict
    inputs: Mapping[str, Any] = {}  # path and state of the file of each input image, by its name in the record
    _copied = ("record", "inputs")  # attributes that a copy has too

    @classmethod
    def from_pixels(cls, pixels, record: dict) -> Self:
        """Makes a picture of (H, W, 3) uint8 pixels, or of an RGB image, which becomes the picture."""
        picture: Any = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
        picture.__class__ = cls
        picture.record = record
        return picture

    def save(
        self,
        fp,
        format: str | None = None,
        *,
        metadata="full",
        quality: int | None = None,
        credentials: str | signing.Signing = "off",
        force=True,
        before: Callable[[bytes], None] = lambda encoded: None,
        **params,
    ) -> None:
        """Saves as PNG, JPEG (4:4:4) or WebP.

        Args:
            fp: a path, or a file open for writing. A path gets its name only when the file is complete.
            format: "PNG", "JPEG" or "WEBP"; None: from the ending of the path.
            metadata: "full", or "minimal": only that a machine made it.
            quality: 1 to 100, of JPEG and WebP; WebP at 100 loses nothing; None: 95.
            credentials: "off"; "on": the file is signed, or saved without where that fails, with a warning in the log;
                "require": signed, or not saved. `signing.Signing` names one's own certificate, and input images.
            force: replaces a file at the path.
            before: called with the file's bytes before any of them is written.
            params: Pillow's own, over the defaults. The contents of `exif` and `pnginfo` are written beside ours.

        Raises:
            UsageError: a format, a level or a quality that is not known, a path that cannot be written, or `xmp`, which
                is ours.
            FileExistsError: without `force`, the path is taken.
            ResourceError: the disk is full.
            CredentialsError: the file must be signed, and cannot be.
        """
        if metadata not in METADATA:
            raise UsageError(f"`metadata` is {metadata!r}", f"one of {', '.join(METADATA)}")
        name = str(getattr(fp, "name", "")) if hasattr(fp, "write") else os.fspath(fp)
        encoding = format.upper() if format else FORMATS.get(Path(name).suffix.lower(), "")
        if encoding not in FORMATS.values():
            found = f"the format {encoding}" if encoding else f"the name {name!r}"
            raise UsageError(f"{found} cannot hold the record of a picture", f"one of {', '.join(FORMATS)}")
        check_quality(quality, encoding)
        params |= {} if quality is None else {"quality": quality}
        encoded, unsigned = self._signed(encoding, metadata, signing.chosen(credentials, self.inputs), params)
        before(encoded)
        self._write(fp, encoded, force, unsigned)

    def _signed(
        self, encoding: str, metadata: str, how: signing.Signing | None, params: dict
    ) -> tuple[bytes, bytes | None]:
        """Returns the file's bytes; and those that were signed, or None: it is not signed."""
        if how is not None:
            encoded = self._encoded(encoding, metadata, self.record | SIGNED, params)
            try:
                return signing.sign(encoded, encoding, self.record, how, metadata=metadata), encoded
            except CredentialsError as error:
                if how.mode != "on":
                    raise
                logger.warning("the picture is saved without credentials: %s", error)
        return self._encoded(encoding, metadata, self.record, params), None

    def _encoded(self, encoding: str, metadata: str, record: dict, params: dict) -> bytes:
        encoded = io.BytesIO()
        super().save(encoded, encoding, **_parameters(encoding, record, metadata, **params))
        return encoded.getvalue()

    def _write(self, fp, encoded: bytes, force: bool, unsigned: bytes | None) -> None:
        with contextlib.nullcontext(fp) if hasattr(fp, "write") else replacing(Path(fp), force) as file:
            file.write(encoded)

    def enlarged(self, times: int) -> "Picture":
        """Returns the picture so many times as wide and as high, smoothed; its record says so."""
        size = (self.width * times, self.height * times)
        pixels = self.resize(size, Image.Resampling.BICUBIC)
        return Picture.from_pixels(pixels, self.record | {"enlarged": times})

    def copy(self) -> "Picture":
        """Copies the picture and its record."""
        picture: Any = super().copy()
        picture.__class__ = type(self)
        picture.__dict__ |= copy.deepcopy({name: value for name, value in vars(self).items() if name in self._copied})
        return picture

    __copy__ = copy

    def __getstate__(self) -> list:
        return [super().__getstate__(), {name: getattr(self, name) for name in self._copied}]

    def __setstate__(self, state: list) -> None:
        super().__setstate__(state[0])
        self.__dict__ |= state[1]


def check_quality(quality: int | None, format: str) -> None:
    """Checks the quality of a format.

    Raises:
        UsageError: out of range, or without effect.
    """
    if quality is not None and format == "PNG":
        raise UsageError("`quality` does nothing in a PNG, which loses nothing", "JPEG or WebP", "leave it out")
    if quality is not None and (type(quality) is not int or not 1 <= quality <= 100):
        raise UsageError(f"`quality` is {quality!r}", "a whole number from 1 to 100")


@contextlib.contextmanager
def opened(image: Image.Image | str | os.PathLike | BinaryIO, most: int | None = MAX_PIXELS) -> Iterator[Image.Image]:
    """Opens an image or an image file within the block, with one error for every fault of it.

    Only the formats of `READ` are tried: other plugins of Pillow run programs, or are seldom tested.

    Args:
        image: an image, which is yielded as it is; a path; or a file.
        most: pixels above which a file is refused before it is decoded; JPEGs are decoded smaller, down to an eighth
            of their sides; None: Pillow's own limit, for callers who decode nothing.

    Raises:
        UsageError: not an image, of another format, too large, or broken.
    """
    name = printable(os.fspath(image)) if isinstance(image, str | os.PathLike) else "the image"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of broken files, and of large ones: twice as many pixels are an error
            if isinstance(image, Image.Image):
                yield image
                return
            with _open_file(image, name) as file:
                if most is not None:
                    _limit(file, name, most)
                yield file
    except UsageError:
        raise
    except Image.DecompressionBombError:
        raise _too_large(f"{name} cannot be opened: it is far too large") from None
    except Exception as error:  # on hostile files Pillow and its decoders raise any class
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        if "MAX_TEXT" in reason:  # of Pillow's PNG reader
            reason = f"a text or colour profile in it is larger than {PngImagePlugin.MAX_TEXT_CHUNK >> 20} MiB"
        of_system = isinstance(error, OSError) and error.errno is not None
        expected, todo = ("", "check the path") if of_system else (_EXPECTED, "")
        raise UsageError(f"{name} cannot be opened: {printable(reason)}", expected, todo) from None


@contextlib.contextmanager
def _open_file(image: str | os.PathLike | BinaryIO, name: str) -> Iterator[Image.Image]:
    with open_regular(image) if isinstance(image, str | os.PathLike) else contextlib.nullcontext(image) as file:
        start = file.read(16)
        if _is_raw(image if isinstance(image, str | os.PathLike) else getattr(image, "name", ""), start):
            raise _raw_error(name)
        try:
            picture = Image.open(file, formats=READ)
        except UnidentifiedImageError:
            if start[4:8] == b"ftyp" and start[8:12] in _HEIF:
                picture = _open_heic(file, name)
            else:
                raise UsageError(f"{name} cannot be opened: it has another format", _EXPECTED) from None
        if _holds_raw(getattr(picture, "tag_v2", {})):
            raise _raw_error(name)
        with picture:
            yield picture


def _is_raw(path: Any, start: bytes) -> bool:
    """Recognises a camera's RAW file by its first bytes, or by its name where they are of no other format."""
    named = isinstance(path, str | os.PathLike) and Path(os.fspath(path)).suffix.lower() in _RAW
    marked = start.startswith(_RAW_STARTS) or start[4:12] == b"ftypcrx " or start[:2] + start[8:10] == b"IICR"
    return marked or (named and not start.startswith(_NO_RAW_STARTS))


def _holds_raw(tags: Mapping) -> bool:
    """Recognises a RAW file by its TIFF tags: Adobe's version, a sensor's pattern, or a preview before the others.

    Pillow would read the preview, which is small.
    """
    is_preview = tags.get(_SUBFILE_TYPE) == 1 and _SUB_IFDS in tags
    return _DNG_VERSION in tags or _CFA_PATTERN in tags or is_preview


def _raw_error(name: str) -> UsageError:
    return UsageError(f"{name} cannot be opened: it is a RAW file of a camera", _EXPECTED, _SIPS)


def _open_heic(file: BinaryIO, name: str) -> Image.Image:
    """Opens an HEIC file through the package `pi-heif`, if it is installed and can.

    Raises:
        UsageError: it is not installed, or does not read this one.
    """
    file.seek(0)
    with contextlib.suppress(ImportError, UnidentifiedImageError):
        import pi_heif  # an extra

        pi_heif.register_heif_opener()
        return Image.open(file, formats=("HEIF",))
    todo = f"{_SIPS}, or install what reads HEIC: pip install 'mlx-flux-krea[heic]'"
    raise UsageError(f"{name} cannot be opened: it is HEIC or AVIF", _EXPECTED, todo)


def _limit(file: Image.Image, name: str, most: int) -> None:
    """Refuses to decode a file with too many pixels; a JPEG is set to be decoded smaller."""
    width, height = file.size
    if width * height > most and isinstance(file, JpegImagePlugin.JpegImageFile):
        reduced = next((n for n in (2, 4, 8) if -(-width // n) * -(-height // n) <= most), 8)
        file.draft(None, (max(1, width // reduced), max(1, height // reduced)))
    if file.width * file.height > most:
        raise _too_large(f"{name} cannot be opened: it is {width} x {height}", most)


def _too_large(found: str, most: int = MAX_PIXELS) -> UsageError:
    return UsageError(found, f"{most / 1e6:.0f} million pixels at most", "make it smaller")


def read_picture(path: Path | BinaryIO) -> dict:
    """Reads the metadata of a picture's file, or of an open one.

    Returns:
        Four values, each None where the file has none: "source_type" (the last word of IPTC's digital source type),
        "software" (EXIF), "parameters" (A1111's text) and "record" (ours).

    Raises:
        UsageError: not an image.
    """
    with opened(path, most=None) as image:
        # Pillow decodes a whole PNG to look for EXIF behind its pixels: not a large one
        is_small = image.width * image.height <= MAX_PIXELS or not isinstance(image, PngImagePlugin.PngImageFile)
        info, exif = image.info, image.getexif() if is_small or "exif" in image.info else Image.Exif()
        comment = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
        utf16 = "utf-16-le" if exif.endian == "<" else "utf-16-be"
    xmp = info.get("xmp") or info.get(_XMP_KEY) or ""
    xmp = xmp.decode("utf-8", "replace") if isinstance(xmp, bytes) else xmp
    source_type = re.search(re.escape(_SOURCE_TYPE) + r"(\w+)", xmp)
    software = exif.get(ExifTags.Base.Software)
    return {
        "source_type": source_type and source_type[1],
        "software": software if isinstance(software, str) else None,
        "parameters": info.get(_A1111_KEY) or _decode_comment(comment, utf16),
        "record": _decode_record(info.get(_KEY)) or _decode_record(xmp),
    }


def read_record(path: Path) -> dict | None:
    """Reads the record in a picture's file; None where it has none.

    Raises:
        UsageError: not an image.
    """
    return read_picture(path)["record"]


def a1111_parameters(record: dict) -> str:
    """Returns a record as the text that AUTOMATIC1111's interface writes, and other tools read."""
    negative, settings = record.get("negative_prompt"), []
    for name, value in (
        ("Steps", record.get("num_inference_steps")),
        ("Sampler", "Euler"),
        ("CFG scale", record.get("true_cfg_scale", 1)),
        ("Distilled CFG Scale", record.get("guidance_scale")),
        ("Seed", record.get("seed")),
        ("Size", f"{record['width']}x{record['height']}" if {"width", "height"} <= record.keys() else None),
        ("Model hash", (record.get("manifest_sha256") or "")[:10] or None),
        ("Model", record.get("model")),
        ("Denoising strength", record.get("strength")),
        ("Hires upscale", None if "image" in record else record.get("upscale")),
        ("Hires steps", None if "image" in record else record.get("upscale_steps")),
        ("Version", record.get("software")),
    ):
        text = f"{value:g}" if isinstance(value, float) else str(value)
        quoted = json.dumps(text, ensure_ascii=False) if re.search("[,:\n]", text) else text
        settings += [f"{name}: {quoted}"] if value is not None else []
    lines = [record.get("prompt", ""), *([f"Negative prompt: {negative}"] if negative else []), ", ".join(settings)]
    return "\n".join(lines)


def _decode_comment(comment, utf16: str) -> str | None:
    if not isinstance(comment, bytes):
        return None
    for mark, code in ((_UNICODE, utf16), (_ASCII, "ascii")):
        if comment.startswith(mark):
            return comment[len(mark) :].decode(code, "replace")
    return None


def _decode_record(text) -> dict | None:
    """Parses the record from its JSON, or from XMP that holds it."""
    text = text if isinstance(text, str) else ""
    if found := _RECORD.search(text):
        text = unescape(found[1])
    try:
        record = parse_json(text)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and "software" in record else None


def _parameters(format: str, record: dict, metadata: str, exif=None, pnginfo=None, **params) -> dict:
    """Returns Pillow's save parameters with marker and record, beside the caller's own."""
    if "xmp" in params:
        raise UsageError("`xmp` is given", "none: ours says that a machine made the picture")
    merged = Image.Exif()
    if exif:
        merged.load(exif if isinstance(exif, bytes) else exif.tobytes())
    task = "img2img" if "image" in record else "txt2img"
    merged[ExifTags.Base.Software] = f"AI generated;{task};flux; {SOFTWARE}"
    shown = record
    if format == "JPEG" and metadata == "full":
        room = _JPEG_EXIF - len(merged.tobytes()) - len(_UNICODE) - 64  # 64: the headers before the comment
        shown = _fitting(record, lambda one: len(_utf16(a1111_parameters(one))) <= room)
        record = _fitting(record, lambda one: len(_xmp(one, full=True).encode()) <= _JPEG_XMP)
    comment = _utf16(a1111_parameters(shown))
    if metadata == "full":
        merged.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = _UNICODE + comment
        merged.endian = ">"  # as the comment is: A1111 reads no other
    if format == "PNG":
        info = PngImagePlugin.PngInfo()
        ours = tuple(key.encode() + b"\0" for key in (_XMP_KEY, _KEY, _A1111_KEY))
        info.chunks = [chunk for chunk in pnginfo.chunks if not chunk[1].startswith(ours)] if pnginfo else []
        info.add_itxt(_XMP_KEY, _xmp(record))
        if metadata == "full":
            info.add_itxt(_A1111_KEY, comment.decode("utf-16-be"))
            info.add_itxt(_KEY, _json(record))
        return {**params, "pnginfo": info, "exif": merged}
    quality = {"quality": QUALITY, "subsampling": 0} if format == "JPEG" else {"quality": QUALITY}
    if format == "WEBP" and params.get("quality") == 100:
        quality |= {"lossless": True, "exact": True}
    return {**quality, **params, "exif": merged, "xmp": _xmp(record, metadata == "full").encode()}


def _xmp(record: dict, full: bool = False) -> str:
    """Returns XMP that says that a machine made the picture, and if `full`, the record."""
    source_type = "compositeWithTrainedAlgorithmicMedia" if "image" in record else "trainedAlgorithmicMedia"
    ours = f"\n   <krea:Record>{escape(_json(record), quote=False)}</krea:Record>" if full else ""
    return _XMP.format(tool=escape(SOFTWARE, quote=False), source_type=_SOURCE_TYPE + source_type, record=ours)


def _json(record: dict) -> str:
    """Returns one line of JSON that XML can hold."""
    return _NO_XML.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(record, ensure_ascii=False))


def _utf16(text: str) -> bytes:
    return text.encode("utf-16-be", "replace")


def _fitting(record: dict, fits: Callable[[dict], bool]) -> dict:
    """Returns the record as long as a JPEG has room for; if it is longer, texts are cut and "truncated" is true."""
    texts = {name: value for name, value in record.items() if isinstance(value, str)}
    length, cut = max(map(len, texts.values()), default=0), record
    while length and not fits(cut):
        length = length * 9 // 10
        cut = record | {name: value[:length] for name, value in texts.items()} | {"truncated": True}
    if cut is not record:
        logger.warning("a JPEG has no room for the whole record: its texts were cut; PNG and WebP hold them")
    return cut

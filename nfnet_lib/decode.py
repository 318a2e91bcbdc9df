"""Encoded images to RGB pixels: strict, so that damage is an error and not a picture, and bounded in memory.

JPEG goes to libjpeg-turbo (simplejpeg), the only reader measured that notices damage inside the scan; other formats to
Pillow. Grey becomes three equal channels, CMYK is converted, alpha is dropped, 16 bits become 8, the orientation in EXIF
is left alone, as TensorFlow's decoder and so the released pipeline do.
"""

import io

import numpy as np
from jaxtyping import UInt8

MAX_PIXELS = 2**26  # decoded at once: 200 MB of RGB. Larger JPEGs are decoded at 1/2, 1/4 or 1/8 of their size.
FORMATS = ("PNG", "WEBP", "JPEG", "BMP", "GIF", "TIFF", "PPM")  # Pillow has readers of many more, some run programs
_FRAMES = {
    0xC0,
    0xC1,
    0xC2,
    0xC3,
    0xC5,
    0xC6,
    0xC7,
    0xC9,
    0xCA,
    0xCB,
    0xCD,
    0xCE,
    0xCF,
}  # JPEG's start-of-frame markers


def decode_image(encoded: bytes | np.ndarray, where: str = "") -> UInt8[np.ndarray, "H W 3"]:
    """RGB pixels of an encoded image, told apart by content; ValueError, beginning with `where`, for what can't be read.

    An array [H, W, 1 or 3] is an image that was stored raw. A JPEG of more than MAX_PIXELS comes scaled down by 2, 4 or 8
    (progressive ones are refused: their decoder holds the whole image); other formats of that size are refused.
    """
    try:
        if isinstance(encoded, np.ndarray):
            return _raw(encoded)
        if encoded[:2] == b"\xff\xd8":
            return _jpeg(encoded)
        return _other(encoded)
    except Exception as error:  # Pillow's readers raise many kinds
        prefix = f"{where}: " if where else ""
        raise ValueError(f"{prefix}not a readable image: {str(error) or type(error).__name__}") from error


def _raw(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] not in (1, 3) or not pixels.size:
        raise ValueError(f"raw array of {pixels.dtype} {list(pixels.shape)}: expected uint8 [H, W, 1 or 3]")
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3))


def _jpeg(encoded: bytes) -> np.ndarray:
    import simplejpeg

    height, width, progressive = _frame(encoded)
    if height * width <= MAX_PIXELS:
        return simplejpeg.decode_jpeg(encoded, "RGB", strict=True)
    factor = next((f for f in (2, 4, 8) if height * width <= MAX_PIXELS * f * f), None)
    if factor is None or progressive:
        raise ValueError(
            f"{'progressive ' * progressive}JPEG of {width} x {height} pixels; at most {MAX_PIXELS:,} at once"
        )
    return simplejpeg.decode_jpeg(
        encoded, "RGB", strict=True, min_height=-(-height // factor), min_width=-(-width // factor)
    )


def _frame(encoded: bytes) -> tuple[int, int, bool]:
    """(height, width, progressive) from a JPEG's start-of-frame segment."""
    at = 2
    while at + 9 < len(encoded):
        if encoded[at] != 0xFF:
            raise ValueError("JPEG without a marker where one must be")
        marker = encoded[at + 1]
        if marker in _FRAMES:
            height, width = (int.from_bytes(encoded[i : i + 2], "big") for i in (at + 5, at + 7))
            if not height or not width:
                raise ValueError(f"JPEG of {width} x {height} pixels")
            return height, width, marker in (0xC2, 0xC6, 0xCA, 0xCE)
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a segment
            at += 2
        else:
            at += 2 + int.from_bytes(encoded[at + 2 : at + 4], "big")
    raise ValueError("JPEG without a frame")


def _other(encoded: bytes) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.format} of {image.width} x {image.height} pixels; at most {MAX_PIXELS:,}")
        return rgb(image)


def rgb(image) -> UInt8[np.ndarray, "H W 3"]:
    """Pixels of a Pillow image; ValueError for floating-point ones."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip instead of scale
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return np.repeat(((grey + 128) // 257).astype(np.uint8)[..., None], 3, axis=-1)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no stated range")
    if image.mode == "P":
        return np.asarray(image.convert("RGBA"))[..., :3].copy()
    return np.asarray(image.convert("RGB"))

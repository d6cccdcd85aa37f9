"""A picture file in, pixels out as a person sees them: upright, in sRGB, on white.

Letters in shapes: H W pixels.
"""

import io
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, features

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # what Pillow may decode, whatever the suffix claims
IMAGE_FORMATS += ("AVIF",) if features.check("avif") else ()
MAX_PIXELS = 2**26  # of a picture: 8192 x 8192; small files can claim far more, and fill the memory
DHASH_SIDE = 32  # a picture's hash compares 32 x 32 neighbours; 8 x 8, as is common, takes all faces for one another
COLOURED = 32  # of 255: channels of yellowed paper differ by less
SRGB = ImageCms.createProfile("sRGB")

# A triangle two output pixels wide. On screentones reduced 1.1 to 7 times it leaves the mean as it is (to 0.25 of 255)
# and less moire than the exact area filter (3.4 of 255 against 4.0; Hamming 4.3, Pillow's box 5.7). Lanczos clips at
# black and white and so shifts the mean, by up to 10.
REDUCE = Image.Resampling.BILINEAR
ENLARGE = Image.Resampling.LANCZOS


def load_image(path: str | Path, box: tuple[float, float, float, float] | None, shape: tuple[int, int]) -> torch.Tensor:
    """The part `box` of the picture, as a person sees it, resized to `shape`.

    Modes 1, L, LA, P, PA, RGB, RGBA, I;16, I, CMYK and LAB are understood, with their colour profiles and transparent
    colours; of an animated file or one of several pages the first picture counts.

    Args:
        box: (left, top, right, bottom) in pixels of the upright picture; None = its largest centred part that has
            the aspect of `shape`.
        shape: (H, W).

    Shape: (3, H, W), float32 in [-1, 1].

    Raises:
        OSError, ValueError, SyntaxError, Image.DecompressionBombError: Pillow can't decode the file.
    """
    return cut_out(read_picture(path)[0], box, shape)


def cut_out(image: Image.Image, box: tuple[float, float, float, float] | None, shape: tuple[int, int]) -> torch.Tensor:
    """What load_image() makes of a file, of an RGB picture."""
    box = box or centred_box((0, 0, *image.size), shape)
    left, top, right, bottom = box
    image = image.crop((left, top, math.ceil(right), math.ceil(bottom)))  # a filter would look beyond the box
    width, height = right - left, bottom - top
    method = REDUCE if width * height > shape[0] * shape[1] else ENLARGE
    image = image.resize(shape[::-1], method, box=(0, 0, width, height))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1.0


def centred_box(frame: tuple[int, int, int, int], shape: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest box of the aspect of `shape` (H, W) in the middle of `frame`, its corner on a whole pixel."""
    left, top, right, bottom = frame
    scale = min((right - left) / shape[1], (bottom - top) / shape[0])
    width, height = shape[1] * scale, shape[0] * scale
    left, top = left + int((right - left - width) / 2), top + int((bottom - top - height) / 2)
    return left, top, left + width, top + height


def read_picture(path: str | Path) -> tuple[Image.Image, str]:
    """The whole picture as RGB, and what is wrong with its colour profile ("" if nothing).

    EXIF orientation first, then 16 bits to 8, the colour profile to sRGB, and alpha over white.

    Raises: as load_image() does.
    """
    with Image.open(path, formats=IMAGE_FORMATS) as opened:
        width, height = opened.size
        if not 0 < width * height <= MAX_PIXELS:
            raise ValueError(f"{width} x {height} pixels, where 1 to {MAX_PIXELS:,} can be read")
        stored_as = opened.tile[0].args if opened.format == "PNG" and opened.tile else ""
        image = ImageOps.exif_transpose(opened)
    profile, alpha, remark = image.info.get("icc_profile"), _alpha(image, stored_as, path), ""
    image.info.pop("transparency", None)
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257.0).round().astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("its pixels are floating-point numbers: save it with 8 or 16 bits")
    elif image.mode not in ("L", "RGB", "CMYK", "LAB"):
        image = image.convert("L" if image.mode in ("1", "LA", "La") else "RGB")
    if profile or image.mode == "LAB":
        try:
            image = _to_srgb(image, profile)
        except (OSError, ValueError, ImageCms.PyCMSError) as error:
            if image.mode == "LAB":
                raise
            remark = f"its colour profile is not used ({(str(error).splitlines() or ['damaged'])[0][:100]})"
    image = image.convert("RGB")
    if alpha is not None:
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image, remark


def _alpha(image: Image.Image, stored_as: str, path: str | Path) -> Image.Image | None:
    """How opaque each pixel is (mode L), or None if all are.

    stored_as: Pillow's name for the layout of a PNG's samples, "" for other files. A PNG's transparent colour (tRNS)
    is a number of its own bit depth, which Pillow passes on as it is, though it widens or narrows the pixels to 8.
    """
    if image.mode in ("LA", "PA", "RGBA"):
        return image.getchannel("A")
    if "transparency" not in image.info:
        return None
    if image.mode == "P":
        return image.convert("RGBA").getchannel("A")
    key = np.array(image.info["transparency"])
    pixels = np.asarray(image.convert("L") if image.mode == "1" else image).astype(int)
    if stored_as == "RGB;16B":  # Pillow keeps the high bytes: read the low ones, too
        with Image.open(path, formats=("PNG",)) as opened:
            opened.tile = [tile._replace(args="RGB;16L") for tile in opened.tile]
            pixels = 256 * pixels + np.asarray(ImageOps.exif_transpose(opened))
    is_clear = pixels == key * {"1": 255, "L;2": 85, "L;4": 17}.get(stored_as, 1)
    return Image.fromarray(np.where(is_clear.all(axis=2) if is_clear.ndim == 3 else is_clear, 0, 255).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """From its colour profile (None: Lab needs none) to sRGB, white to white (relative colorimetric).

    Raises:
        OSError, ValueError, ImageCms.PyCMSError: the profile is damaged, or one for other pixels.
    """
    if image.mode == "LAB":
        source, space = ImageCms.createProfile("LAB"), "LAB"
    else:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = {"GRAY": "L"}.get(name := source.profile.xcolor_space.strip(), name)
        if space == "RGB" and image.mode == "L":  # a grey file of an RGB program
            image = image.convert("RGB")
    if space != image.mode:
        raise ValueError(f"it is for {space}, the pixels are {image.mode}")
    intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
    return ImageCms.profileToProfile(image, source, SRGB, renderingIntent=intent, outputMode="RGB")


def to_bytes(picture: Image.Image, kind: str, **options) -> bytes:
    """A picture as a file of this kind. options: Pillow's, for that kind."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def colour_share(picture: Image.Image) -> float:
    """Share of an RGB picture's area whose channels differ by more than COLOURED, seen from afar, so without noise."""
    small = np.asarray(picture.resize((32, 32), Image.Resampling.BOX, reducing_gap=2.0)).astype(int)
    return float((small.max(axis=2) - small.min(axis=2) > COLOURED).mean())


def dhashes(grey: Image.Image) -> tuple[bytes, bytes]:
    """Difference hashes (Krawetz 2013) of a picture of mode L and of its mirror image.

    One says where brightness grows by more than noise to the right, on a 32 x 32 grid. Nearly the same pictures
    differ in few of its 1,024 bits, whatever their size or compression.
    """
    small = np.asarray(grey.resize((DHASH_SIDE + 1, DHASH_SIDE), Image.Resampling.LANCZOS)).astype(int)
    return tuple(np.packbits(np.diff(turned, axis=1) > 16).tobytes() for turned in (small, small[:, ::-1]))

"""Which part of a picture is trained on, and in what shape: panel frames, buckets, where the rest is cut.

Boxes are (left, top, right, bottom) in pixels of the upright picture.
"""

import functools
import itertools
import math

import numpy as np
from PIL import Image

from training.pictures import centred_box

LEAST_AREA, MOST_AREA = 0.8, 1.25  # of a bucket, times resolution^2
LONGEST = 3  # a bucket's sides are at most 3 : 1: of longer pictures more is cut
MUCH_CUT = 0.06  # of a side: less is cut from any picture of at most 3 : 1 at 512 pixels
LITTLE_CUT = 0.02  # of a side: no head is in that
SMALL = 128  # pixels a side, at most, of the picture in which ink is measured
HEAD_UP = 30  # times as much counts ink that is cut off at the top: heads are up
SMALLEST = 64  # pixels a side: in a smaller picture any stroke might be a line
DEEPEST = 8  # a frame is looked for in the outer eighth of each side
DARK, BRIGHT = 128, 160  # of 255: a frame line is darker, the gutter beyond it brighter
FULL = 0.97  # of the side must be line, or gutter: anything that crosses either keeps the side as it is
TONE = 48  # of 255: so far from the paper's brightness is ink
DROP = 0.25  # of the side: so much darker is a line at the very edge than what it frames


def find_frame(grey: np.ndarray) -> tuple[int, int, int, int]:
    """The box inside a panel's frame: lines near the edges are cut away, with what lies outside of them.

    A line is dark and straight over nearly the whole side, in the outer eighth of the picture. Beyond it there is
    nothing, more black, or a gutter that nothing crosses: so a head that breaks out of its panel keeps that side, and
    a drawing with a white margin but no line is left alone. The innermost line counts.

    Args:
        grey: (H, W), uint8.
    """
    height, width = grey.shape
    if min(height, width) < SMALLEST:
        return 0, 0, width, height
    deep = (width // DEEPEST, height // DEEPEST)
    turned = (grey.T, grey, grey[:, ::-1].T, grey[::-1])  # each side's pixels, from the edge inwards
    found = whole = deep * 2  # cut from left, top, right, bottom; first only the middle of each side is looked at
    for _ in range(3):  # then all of it, but for what the sides next to it lose
        cuts = []
        for number, side in enumerate(turned):
            before, after = 1 - number % 2, 3 - number % 2  # the sides next to it
            length = side.shape[1]
            span = slice(found[before] or deep[before], length - (found[after] or deep[before]))
            cuts.append(_outside(side, deep[number % 2], span, slice(whole[before], length - whole[after])))
        found = whole = tuple(cuts)
    left, top, right, bottom = found
    return left, top, width - right, height - bottom


def _outside(side: np.ndarray, deepest: int, span: slice, whole: slice) -> int:
    """How many rows to cut, which come from the edge inwards: up to the innermost frame line and with it, else 0.

    deepest: rows that may be cut. span: the columns that the line must fill. whole: those in which nothing may cross
    the gutter.
    """
    slant = 1 + side.shape[1] // 250  # rows that a line may be off, scanned or drawn askew
    thickest = max(6, deepest // 6)  # of a line; what is thicker may be hair or a night sky
    side = side[: deepest + thickest + 2 * slant]
    dark = side < DARK
    counts = np.pad(dark[:, span], ((slant + 1, slant), (0, 0))).cumsum(axis=0, dtype=np.int32)
    is_line = (counts[2 * slant + 1 :] > counts[: -2 * slant - 1]).mean(axis=1) >= FULL
    is_clean = (side[:, whole] >= BRIGHT).mean(axis=1) >= 0.99
    share = dark[:, whole].mean(axis=1)
    edges = np.flatnonzero(np.diff(is_line, prepend=False, append=False))
    for start, end in edges.reshape(-1, 2)[::-1].tolist():  # the innermost first
        inside = share[end : end + 3].min(initial=1.0)  # darkness of what it frames
        if start > 0 and start + slant >= deepest:
            continue
        is_thin = end < len(side) and end - start - 2 * slant <= thickest
        is_straight = share[max(0, end - 2 * slant - 1) : end].max() - inside >= DROP
        if start == 0 and is_straight and (is_thin or share[slant : end - 2 * slant].min() >= FULL):
            return min(end, deepest)
        if start > 0 and is_clean[max(0, start - 1 - slant) : start].any():
            return min(end if is_thin else start + slant, deepest)
    return 0


@functools.cache
def bucket_shapes(resolution: int, unit: int) -> list[tuple[int, int]]:
    """The shapes (H, W) that pictures may have: the square of `resolution`, and others of nearly its area.

    Their sides are multiples of `unit`, at least two of them, and at most LONGEST : 1.
    """
    sides = [unit * number for number in range(2, 2 * resolution // unit + 1)]
    shapes = [shape for shape in itertools.product(sides, sides) if max(shape) <= LONGEST * min(shape)]
    others = {shape for shape in shapes if LEAST_AREA <= math.prod(shape) / resolution**2 <= MOST_AREA}
    return sorted(others | {(resolution, resolution)})


def near_shapes(width: int, height: int, resolution: int, unit: int) -> list[tuple[int, int]]:
    """The shapes of bucket_shapes() for which at most MUCH_CUT of a side is cut; at least one.

    That of the nearest aspect comes first; of those of one aspect that with the area nearest to the square's.
    """

    def distance(shape: tuple[int, int]) -> tuple[float, float]:
        stretch = abs(math.log(shape[1] * height / (shape[0] * width)))
        return round(stretch, 9), abs(math.log(math.prod(shape) / resolution**2))

    nearest, *others = sorted(bucket_shapes(resolution, unit), key=distance)
    return [nearest, *(shape for shape in others if distance(shape)[0] < -math.log(1 - MUCH_CUT))]


def ink_of(grey: Image.Image, frame: tuple[int, ...]) -> np.ndarray:
    """Darkness and strokes (changes of brightness) inside `frame`, made small so that a screentone is even grey.

    Args:
        grey: the upright picture, mode L.

    Shape: (h, w), at most SMALL each.
    """
    left, top, right, bottom = frame
    small = [min(side, SMALL) for side in (right - left, bottom - top)]
    pixels = np.asarray(grey.resize(small, Image.Resampling.BILINEAR, box=frame)).astype(float)
    strokes = sum(np.abs(np.diff(pixels, axis=along, append=pixels.take([-1], along))) for along in (0, 1))
    return 255 - pixels + strokes


def place_box(ink: np.ndarray, frame: tuple[int, ...], shape: tuple[int, int]) -> tuple[float, tuple[float, ...]]:
    """(ink cut off, the largest box inside `frame` with the aspect of `shape` (H, W), where that is least).

    As heads are up, what is cut at the top counts HEAD_UP times. Of equal places the middle one is taken. The
    corner is on a whole pixel.

    Args:
        ink: inside the frame: see ink_of().
    """
    left, top, right, bottom = frame
    size, scale = (right - left, bottom - top), min((right - left) / shape[1], (bottom - top) / shape[0])
    kept = (shape[1] * scale, shape[0] * scale)
    axis = int(size[0] - kept[0] < size[1] - kept[1])  # what is cut: 0 from left and right, 1 from top and bottom
    excess = size[axis] - kept[axis]
    ink = ink.sum(axis=axis)
    ink = np.append(0, (ink - ink.min()).cumsum())  # up to each row or column; the emptiest is paper, whatever its tone
    offsets = np.arange(int(excess) + 1)
    edges = np.linspace(0, size[axis], len(ink))
    before, until = np.interp(offsets, edges, ink), np.interp(offsets + kept[axis], edges, ink)
    cut = (HEAD_UP if axis else 1) * before + ink[-1] - until
    best = np.lexsort((np.abs(offsets - excess / 2), cut.round(6)))[0].item()
    left, top = (left + best, top) if axis == 0 else (left, top + best)
    return cut[best].round(6).item(), (left, top, left + kept[0], top + kept[1])


def ink_cut(grey: Image.Image, frame: tuple[int, ...], box: tuple[float, ...]) -> float:
    """How much of an edge that was cut to fit shows what had ended before the picture's own edge, as a whole head did.

    The largest share over the cut sides; 0 if hardly anything was cut. What runs to the picture's edge (a neck, a
    background) was cut there already and doesn't count; nor does paper, of whatever tone.
    """
    pixels = np.asarray(grey).astype(np.int16)
    left, top, right, bottom = (round(side) for side in box)
    little_x, little_y = LITTLE_CUT * (frame[2] - frame[0]), LITTLE_CUT * (frame[3] - frame[1])
    rows, columns = slice(top, bottom), slice(left, right)
    sides = (  # is it cut, the cut, the picture's edge
        (top - frame[1] > little_y, pixels[top, columns], pixels[frame[1], columns]),
        (frame[3] - bottom > little_y, pixels[bottom - 1, columns], pixels[frame[3] - 1, columns]),
        (left - frame[0] > little_x, pixels[rows, left], pixels[rows, frame[0]]),
        (frame[2] - right > little_x, pixels[rows, right - 1], pixels[rows, frame[2] - 1]),
    )
    found = [0.0]
    for cut, edge in (lines for is_cut, *lines in sides if is_cut):
        inked, before = ((np.abs(line - np.median(edge)) > TONE).mean() for line in (cut, edge))
        found.append(float(inked - 3 * before))
    return max(found)


def frame_picture(picture: Image.Image, resolution: int, unit: int, framing: str, trim_frames: bool) -> tuple:
    """(what is left without a panel's frame, the box in it that is trained on, the shape (H, W) that becomes).

    framing: "buckets" = the picture's own shape, as far as the base has one; "square" = the centre square.
    """
    grey = picture.convert("L")
    frame = find_frame(np.asarray(grey)) if trim_frames else (0, 0, *grey.size)
    if framing == "square":
        return frame, centred_box(frame, (resolution, resolution)), (resolution, resolution)
    shapes = near_shapes(frame[2] - frame[0], frame[3] - frame[1], resolution, unit)
    ink = ink_of(grey, frame)
    places = [(*place_box(ink, frame, shape), shape) for shape in shapes]
    _, box, shape = min(places, key=lambda place: place[0])  # the first of equals: nothing is cut from it, or little
    return frame, box, shape

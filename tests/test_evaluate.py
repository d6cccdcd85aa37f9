"""The measures against their definitions, and the pictures they are taken of.

    python -m pytest tests/test_evaluate.py
"""

import itertools
import math

import numpy as np
import pytest

import evaluate_lora


def flat(*colours) -> np.ndarray:
    """One 8 x 8 picture per colour."""
    return np.stack([np.full((8, 8, 3), colour, dtype=np.uint8) for colour in colours])


def test_colourfulness_is_hasler_and_suesstrunk_s_formula():
    assert evaluate_lora.colourfulness(flat((0, 0, 0), (128, 128, 128), (255, 255, 255))).tolist() == [0, 0, 0]
    picture = np.random.default_rng(0).integers(0, 256, (1, 9, 7, 3), dtype=np.uint8)
    pixels = [tuple(int(value) for value in pixel) for pixel in picture[0].reshape(-1, 3)]
    rg = [r - g for r, g, b in pixels]
    yb = [(r + g) / 2 - b for r, g, b in pixels]
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    variance = lambda values: mean([(value - mean(values)) ** 2 for value in values])  # noqa: E731
    expected = math.sqrt(variance(rg) + variance(yb)) + 0.3 * math.sqrt(mean(rg) ** 2 + mean(yb) ** 2)
    assert evaluate_lora.colourfulness(picture)[0] == pytest.approx(expected)
    assert evaluate_lora.colourfulness(flat((255, 0, 0)))[0] == pytest.approx(0.3 * math.hypot(255, 127.5))


def test_ink_share_counts_dark_pixels_and_edge_strength_sees_strokes_not_blur():
    picture = flat((255, 255, 255), (255, 255, 255), (0, 0, 0))
    picture[0, :, :2] = 0
    blurred = np.linspace(0, 255, 8).astype(np.uint8)[None, :, None]
    picture[1] = blurred
    assert evaluate_lora.ink_share(picture).tolist() == [0.25, 0.25, 1.0]
    stroke, blur, nothing = evaluate_lora.edge_strength(picture)
    assert stroke == pytest.approx(0.5) and blur == pytest.approx(1 / 7, abs=0.01) and nothing == 0


def test_diversity_is_the_mean_distance_to_the_others():
    pictures = np.random.default_rng(1).integers(0, 256, (5, 6, 6, 3), dtype=np.uint8)
    grey = evaluate_lora.luma(pictures)
    pairs = list(itertools.combinations(range(5), 2))
    distance = {(a, b): math.sqrt(((grey[a] - grey[b]) ** 2).mean()) for a, b in pairs}
    expected = [sum(value for pair, value in distance.items() if index in pair) / 4 for index in range(5)]
    assert evaluate_lora.diversity(pictures) == pytest.approx(expected)
    assert evaluate_lora.diversity(np.repeat(pictures[:1], 4, axis=0)).max() < 1e-6  # one image repeated: collapse


def test_a_contact_sheet_shows_every_picture_in_its_place():
    rows = [[np.full((16, 16, 3), 40 * row + 10 * column, dtype=np.uint8) for column in range(3)] for row in range(5)]
    sheet = np.asarray(evaluate_lora.contact_sheet(rows, ["a", "b", "c"], ["a caption"] * 5))
    for row, column in itertools.product(range(5), range(3)):
        block, line = divmod(row, 3)  # five rows: two blocks of three and two
        left = 16 + block * (3 * evaluate_lora.TILE + 16) + column * evaluate_lora.TILE
        top = 36 + line * (evaluate_lora.TILE + 40)
        assert (sheet[top + 50, left + 50] == 40 * row + 10 * column).all()

"""Do the weights follow rare features, or odd wording? Figures for any caption file, or folder in any layout.

    python bench/weights_check.py CAPTIONS.json [WORDS.txt ...] [--each beard flowers freckles]

Needs no pictures: all faces of the file are weighed as if all were trained on. Prints for each list of visual words
the mean weight of the faces with a rare one (in 1 to 5 % of the faces) over that of the others; the correlation of the
weight with a face's share of words that no other face uses; range, effective sample size, heaviest and lightest faces.
The lists, visual_words.txt and visual_words_2.txt unless given, were fixed before any weight was looked at.
"""

import argparse
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from dataset import clip_to_mean_one, strongest_terms  # noqa: E402
from training.captions import kind_of, tidy_tags  # noqa: E402
from training.files import InputError  # noqa: E402
from training.layouts import read_captions, read_layout, shown  # noqa: E402

RARE = (0.01, 0.05)  # of the faces have the word


def read_words(file: Path) -> list[str]:
    """The words of a list; lines that start with # are comments."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return sorted({word for line in lines if not line.startswith("#") for word in line.lower().split()})


def ratio(weights: np.ndarray, has: np.ndarray) -> float:
    """Mean weight of the faces that have it over that of the others; NaN if all or none have it."""
    return weights[has].mean() / weights[~has].mean() if 0 < has.sum() < len(has) else float("nan")


def check(names: list[str], faces: list[tuple[str, ...]], lists: dict[str, list[str]], each: list[str]) -> str:
    """The figures, as lines. `faces` are the captions of each face."""
    terms = strongest_terms(faces)
    raw = np.array([np.mean([rarity for _, rarity in some]) if some else np.nan for some in terms])
    weights = clip_to_mean_one(np.where(np.isnan(raw), np.nanmean(raw), raw), 0.5, 2.0)
    words = [set(re.findall(r"\w\w+", " ".join(captions).lower())) for captions in faces]
    frequency = Counter(word for some in words for word in some)
    once = np.array([np.mean([frequency[word] == 1 for word in some]) if some else 0.0 for some in words])
    lines = [
        f"{len(faces)} faces, {len(frequency)} words, {np.mean([n == 1 for n in frequency.values()]):.0%} used once"
    ]
    for title, visual in lists.items():
        rare = [word for word in visual if RARE[0] <= frequency[word] / len(faces) <= RARE[1]]
        has = np.array([bool(some & set(rare)) for some in words])
        lines.append(f"{title}: {len(rare)} of {len(visual)} words are rare, {has.sum()} faces have one")
        lines.append(f"  their mean weight over that of the others: {ratio(weights, has):.3f}")
    for word in each:
        has = np.array([any(other.startswith(word) for other in some) for some in words])
        lines.append(f"{word}...: {has.sum()} faces, {ratio(weights, has):.3f} times the others' mean weight")
    correlation = np.corrcoef(weights, once)[0, 1] if weights.std() and once.std() else float("nan")
    lines.append(f"correlation of the weight with the share of words used once: {correlation:.3f}")
    effective = weights.sum() ** 2 / (weights**2).sum()
    lines.append(f"range {weights.min():.2f} to {weights.max():.2f}, effective sample size {effective:.1f}")
    order = np.argsort(-weights, kind="stable")
    for label, some in (("heaviest", order[:5]), ("lightest", order[-5:])):
        lines += [
            f"  {label} {weights[i]:.2f}  {shown(names[i])}: {', '.join(term for term, _ in terms[i])}" for i in some
        ]
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("captions", type=Path, help="a caption file, or a folder")
    parser.add_argument("words", type=Path, nargs="*", help="lists of visual words")
    parser.add_argument(
        "--each", nargs="*", default=[], metavar="WORD", help="beginnings of words, one figure for each"
    )
    given = parser.parse_args(arguments)
    path = given.captions
    entries = read_layout(path, path / "captions.json").entries if path.is_dir() else read_captions(path)
    entries = [entry for entry in entries if entry.captions]
    faces = [entry.captions for entry in entries]
    if not faces:
        raise InputError(f"{path} has no captions")
    if (kind := kind_of(faces)) != "sentences":
        faces = [tidy_tags(captions, kind) for captions in faces]
    files = given.words or [HERE / "visual_words.txt", HERE / "visual_words_2.txt"]
    print(check([entry.name for entry in entries], faces, {file.name: read_words(file) for file in files}, given.each))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    try:
        main(sys.argv[1:])
    except (InputError, OSError) as error:
        print(f"weights_check.py: {error}", file=sys.stderr)
        sys.exit(2)

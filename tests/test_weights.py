"""The weights: TF-IDF of few strong terms against a reference of its own, repeats, and bench/weights_check.py."""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import make_faces
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from dataset import FACE_WORDS, MangaFaceDataset, clip_to_mean_one, strongest_terms

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
import weights_check  # noqa: E402


def raw_by_hand(captions: list[tuple[str, ...]]) -> np.ndarray:
    """Mean of tf idf^2 over the three largest tf idf, by loops."""
    stop = set(ENGLISH_STOP_WORDS) - set(FACE_WORDS)
    of_captions = [[set(re.findall(r"\w\w+", text.lower())) - stop for text in texts] for texts in captions]
    words = [set().union(*some) for some in of_captions]
    raw = []
    for face, some in enumerate(of_captions):
        strengths = []
        for word in words[face]:
            df = sum(word in others for others in words)
            if df > 1 or len(words) <= 100:
                tf = sum(word in caption for caption in some) / len(some)
                idf = math.log((1 + len(words)) / (1 + df)) + 1
                strengths.append((-tf * idf, word, tf * idf * idf))
        raw.append(np.mean([value for *_, value in sorted(strengths)[:3]]))
    return np.array(raw)


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.5, 2.0), (0.05, 50.0), (0.9, 1.1), (0.2, 1.02), (1.0, 9.0), (0.3, 1.0), (0.98, 3.0), (1e-9, 1e300)],
)
def test_weights_are_the_clipped_mean_of_three_terms_with_mean_one(manga, monkeypatch, low, high):
    monkeypatch.setattr(manga, "weight_min", low)
    monkeypatch.setattr(manga, "weight_max", high)
    raw = raw_by_hand([manga.faces[index].captions for index in manga.train])
    weights = manga._calculate_sample_weights()
    assert weights.dtype == np.float64 and abs(weights.mean() - 1) < 1e-9
    assert low <= weights.min() and weights.max() <= high
    between = (weights > low * (1 + 1e-12)) & (weights < high * (1 - 1e-12))
    if between.any():
        factor = (weights / raw)[between]
        np.testing.assert_allclose(factor, factor[0], rtol=1e-9)
        np.testing.assert_allclose(weights, np.clip(factor[0] * raw, low, high), rtol=1e-9)


def test_what_more_captions_say_is_stronger_and_a_fourth_term_has_no_say():
    faces = [("long hair", "long hair", "hat"), ("long hair", "scar", "scar"), ("short hair",) * 3, ("hat", "scar")]
    terms = [[term for term, _ in some] for some in strongest_terms(faces)]
    assert terms[1][0] == "scar" and terms[0][:2] == ["long", "hair"] and all(len(some) <= 3 for some in terms)
    assert len(strongest_terms([*faces[:3], ("hat scar long hair",)])[3]) == 3


def test_over_fifty_faces_a_word_of_one_face_alone_does_not_count():
    def strongest(count: int) -> set[str]:
        faces = [("manga face",)] * (count - 3) + [("manga glasses",)] * 2 + [("manga oddly",)]
        return {term for some in strongest_terms(faces) for term, _ in some}

    assert strongest(50) == {"manga", "face", "glasses", "oddly"}
    assert strongest(51) == {"manga", "face", "glasses"}


def test_words_of_faces_are_no_stop_words():
    assert set(FACE_WORDS) <= ENGLISH_STOP_WORDS
    (terms,) = strongest_terms([("the serious one with a thick beard",)])
    assert {term for term, _ in terms} == {"serious", "thick", "beard"}


@pytest.mark.parametrize("captions", [["the and of"] * 9, ["!?"] * 9, ["manga style"] * 120])
def test_captions_without_a_difference_weigh_one(tmp_path, captions):
    np.testing.assert_allclose(make_faces(tmp_path, captions).weights, 1, rtol=1e-9)


def test_the_demo_s_rare_attributes_are_drawn_more_often(manga):
    for word, least in (("beard", 1.2), ("flowers", 1.08), ("freckles", 1.04)):
        has = np.array([any(word in caption for caption in manga.faces[index].captions) for index in manga.train])
        assert manga.weights[has].mean() / manga.weights[~has].mean() > least, word


# Repeats -----------------------------------------------------------------------------------------------------------


def repeated(folder: Path, demo_captions, **options) -> MangaFaceDataset:
    """20 faces in a kohya folder of 4 repeats, 20 in one of 1."""
    for name, some in (("4_girl", demo_captions[:20]), ("1_boy", demo_captions[20:40])):
        make_faces(folder / name, some)
        (folder / name / "captions.json").unlink()
        for number, texts in enumerate(some):
            (folder / name / f"face{number:03d}.txt").write_text("\n".join(texts), encoding="utf-8")
            picture = folder / name / f"face{number:03d}.png"
            picture.write_bytes(picture.read_bytes() + name.encode())  # a file of its own
    return MangaFaceDataset(folder, folder / "none.json", 8, validation_share=0, **options)


def test_repeats_multiply_the_weight_and_act_even_without_tf_idf(tmp_path, demo_captions):
    faces = repeated(tmp_path, demo_captions)
    repeats = np.array([face.repeats for face in faces.faces])
    assert sorted(set(repeats)) == [1, 4]
    raw = clip_to_mean_one(raw_by_hand([face.captions for face in faces.faces]), 0.5, 2.0)
    np.testing.assert_allclose(faces.weights, raw * repeats / (raw * repeats).mean(), rtol=1e-9)
    assert abs(faces.weights.mean() - 1) < 1e-9
    off = MangaFaceDataset(tmp_path, tmp_path / "none.json", 8, "off", validation_share=0)
    np.testing.assert_allclose(off.weights, repeats / repeats.mean())
    drawn = np.bincount(np.concatenate([off.epoch_order(epoch) for epoch in range(60)]), minlength=40)
    assert np.abs(drawn - 60 * off.weights).max() <= 2.51
    assert "acts through repeats alone" in off.report()
    loss = MangaFaceDataset(tmp_path, tmp_path / "none.json", 8, "loss", validation_share=0)
    assert sorted(loss.epoch_order(3)) == list(range(40)) and (loss.loss_weights() == loss.weights).all()


# bench/weights_check.py --------------------------------------------------------------------------------------------


def figures(capsys, *arguments) -> str:
    weights_check.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_the_check_of_the_weights_by_hand(tmp_path, capsys):
    entries = [{"image_name": f"face{n}", "captions": ["manga face", "plain"]} for n in range(96)]
    entries += [{"image_name": f"rare{n}", "captions": ["manga glasses", "glasses"]} for n in range(4)]
    (tmp_path / "a.json").write_text(json.dumps(entries))
    (tmp_path / "words.txt").write_text("# a comment with face in it\nglasses manga\nbeard")
    shown = figures(capsys, tmp_path / "a.json", tmp_path / "words.txt", "--each", "glass")
    assert "100 faces, 4 words, 0% used once" in shown
    assert "words.txt: 1 of 3 words are rare, 4 faces have one" in shown
    faces = [tuple(entry["captions"]) for entry in entries]
    weights = clip_to_mean_one(raw_by_hand(faces), 0.5, 2.0)
    ratio = weights[96:].mean() / weights[:96].mean()
    assert ratio > 1.5 and f"that of the others: {ratio:.3f}" in shown
    assert f"glass...: 4 faces, {ratio:.3f} times" in shown
    assert "heaviest 2.00  rare0: glasses, manga" in shown and "once: nan" in shown


def test_odd_wording_is_not_what_the_weights_follow(tmp_path, capsys):
    """As measured on real captions: prose in which each face has words of its own, and glasses are rare."""
    rng, entries = np.random.default_rng(0), []
    common = ["hair", "eyes", "mood", "gaze", "manga", "style", "shadow", "light", "calm", "young", "woman", "man"]
    for number in range(200):
        own = [f"odd{number}x{n}" for n in range(rng.integers(0, 6))]
        sentences = [" ".join(rng.choice(common, 4)) for _ in range(6)] + [" ".join(["this", *own])]
        if number % 25 == 0:
            sentences[:3] = [f"{text} glasses" for text in sentences[:3]]
        entries.append({"image_name": f"face{number}", "captions": sentences})
    (tmp_path / "a.json").write_text(json.dumps(entries))
    shown = figures(capsys, tmp_path / "a.json")
    ratio, correlation = (float(re.search(text + r"(-?\d\.\d+)", shown)[1]) for text in ("others: ", "once: "))
    assert ratio >= 1.25 and abs(correlation) <= 0.5


def test_the_check_reads_folders_and_names_what_it_cannot_read(tmp_path, capsys):
    make_faces(tmp_path / "faces", ["a hat", "a scar"])
    assert "2 faces" in figures(capsys, tmp_path / "faces")
    with pytest.raises(weights_check.InputError):
        weights_check.main([str(tmp_path / "none.json")])


def test_two_lists_of_visual_words_are_there_and_were_made_apart():
    first, second = (set(weights_check.read_words(ROOT / "bench" / f"visual_words{n}.txt")) for n in ("", "_2"))
    assert 70 <= len(first) <= 100 and 150 <= len(second) <= 250
    assert len(second - first) > 100

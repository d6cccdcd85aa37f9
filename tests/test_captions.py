"""From captions to the texts that are drawn: packs, tags, shuffles, the trigger word; by a tokenizer's own count."""

import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_faces
from hypothesis import given, settings
from hypothesis import strategies as st

from training.base_model import load_tokenizer
from training.captions import MAX_VARIANTS, kind_of, packs, shuffles, split_tags, tidy_tags
from training.denoising import draw_batch, validate
from training.encoding import EncodedDataset

ROOT = Path(__file__).resolve().parent.parent
SENTENCES = ["A girl smiles.", "Her hair is long, and dark", "She wears round glasses!", "A calm, quiet mood ..."]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ROOT / "demo" / "base")


@pytest.fixture(scope="module")
def count(tokenizer):
    return lambda texts: [len(ids) for ids in tokenizer(texts, truncation=False).input_ids]


# Packs -----------------------------------------------------------------------------------------------------------

word = st.sampled_from(
    ["girl", "hair", "eyes", "scar", "o'clock", "well-kept", "42", "日本", "...", "!?", "-", "É", "x"]
)
caption = st.builds(
    lambda words, end: (" ".join(words) + end).strip(),
    st.lists(word, min_size=1, max_size=12),
    st.sampled_from(["", ".", "!", ",", "...", '"', " .", "…", "?!"]),
)


def packs_by_counting(captions: list[str], limit: int, prefix: str, count) -> list[str]:
    """The same by asking the tokenizer about every whole text on the way, which packs() never does."""
    bodies, found = [some.rstrip(" .,") or some for some in captions], []
    for start in range(len(captions)):
        parts = [bodies[start]]
        if count([prefix + bodies[start]])[0] <= limit:
            for body in [*bodies[start + 1 :], *bodies[:start]]:
                if count([prefix + ", ".join([*parts, body])])[0] <= limit:
                    parts.append(body)
        found.append(prefix + (", ".join(parts) if len(parts) > 1 else captions[start]))
    return found


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    captions=st.lists(caption, min_size=1, max_size=7, unique=True),
    limit=st.sampled_from([8, 20, 77]),
    prefix=st.sampled_from(["", "sks, ", "my name!, "]),
)
def test_packs_are_whole_captions_that_fit_and_leave_no_room_for_another(captions, limit, prefix, count):
    assert packs(tuple(captions), count, limit, prefix) == packs_by_counting(captions, limit, prefix, count)


def test_packs_by_hand(count):
    def by_characters(texts):
        return [2 + len(text.replace(" ", "")) for text in texts]

    captions = ("aaaa.", "bbb", "cccccc", "d")
    assert packs(captions, by_characters, 2 + 10) == [
        "aaaa, bbb, d",  # 4 + 1 + 3 = 8; the comma and c... don't fit, the comma and d do
        "bbb, cccccc",  # 3 + 1 + 6
        "cccccc, d",  # 6 + 1 + 1 = 8; not the comma and aaaa
        "d, aaaa, bbb",
    ]
    assert packs(captions, by_characters, 2 + 10, "e, ")[0] == "e, aaaa, bbb"  # 1 + 1 + 4 + 1 + 3
    assert packs(("x" * 99, "y"), by_characters, 2 + 10) == ["x" * 99, "y"]
    assert packs(("Alone. ",), by_characters, 77) == ["Alone. "]


def test_a_face_s_texts_are_its_captions_then_its_packs_and_the_first_pack_validates(tmp_path, tokenizer):
    faces = make_faces(tmp_path, [SENTENCES, "scar", ["scar", "a hat"], ["long " * 90, "short"]], validation_share=0)
    assert faces.texts[0] == "" and faces.texts[1:5] == SENTENCES
    assert [len(indices) for indices in faces.text_indices] == [4, 1, 2, 2]  # no tokenizer, so no packs yet
    faces.make_texts(tokenizer)
    texts = [[faces.texts[index] for index in indices] for indices in faces.text_indices]
    first = [faces.texts[index] for index in faces.first_text]
    joined = "A girl smiles, Her hair is long, and dark, She wears round glasses!, A calm, quiet mood"
    assert texts[0][:5] == [*SENTENCES, joined] and len(texts[0]) == 8
    assert texts[1:3] == [["scar"], ["scar", "a hat", "scar, a hat", "a hat, scar"]]
    assert texts[3] == [("long " * 90).strip(), "short"]  # the long one fills its pack alone, beyond the end
    assert first == [joined, "scar", "scar, a hat", ("long " * 90).strip()]
    assert len(set(faces.texts)) == len(faces.texts)
    assert "Texts over 77 tokens: 1 of 8" in faces.report(tokenizer) and "loses 'long long" in faces.report(tokenizer)


def test_seven_long_sentences_a_face_are_never_cut(tmp_path, tokenizer, count):
    rng = random.Random(0)
    words = ["portrait", "woman", "eyes", "hair", "lashed", "winking", "smile", "open,", "long;", "-", "short"]
    captions = [[" ".join(rng.choices(words, k=rng.randint(12, 25))) + "." for _ in range(7)] for _ in range(12)]
    faces = make_faces(tmp_path, captions)
    faces.make_texts(tokenizer)
    assert max(count(faces.texts)) <= 77
    assert all(len(indices) > 7 for indices in faces.text_indices)
    for face, text in zip(faces.faces, faces.first_text, strict=True):
        assert faces.texts[text].startswith(face.captions[0].rstrip("."))
        assert sum(caption.rstrip(".") in faces.texts[text] for caption in face.captions) >= 2


def test_draws_take_every_caption_and_pack_and_validation_reads_the_first_pack(tmp_path, tokenizer):
    faces = make_faces(tmp_path, [[f"{name} {number}" for name in ("eyes", "hair")] for number in range(16)])
    faces.make_texts(tokenizer)
    drawn = {}
    for step in range(60):
        batch = draw_batch(faces, range(len(faces)), 0, step, (1, 2, 2), 1000, 0.0)
        for face, text in zip(batch.faces.tolist(), batch.texts.tolist(), strict=True):
            drawn.setdefault(face, set()).add(text)
    assert drawn == {face: set(faces.text_indices[face]) for face in faces.train}
    assert all(len(some) == 4 for some in drawn.values())

    seen = Counter()

    def unet(noisy, timesteps, text_embeddings, return_dict):
        seen.update(text_embeddings[:, 0, 0].int().tolist())
        return (torch.zeros_like(noisy),)

    scheduler = SimpleNamespace(
        config=SimpleNamespace(prediction_type="epsilon", num_train_timesteps=1000), add_noise=lambda x, noise, t: x
    )
    latents = torch.zeros(16, 2, 1, 2, 2)
    encoded = EncodedDataset(latents, torch.arange(len(faces.texts)).float()[:, None, None], torch.device("cpu"))
    validate(unet, scheduler, faces, encoded, 0)
    assert seen == {faces.first_text[face]: 4 for face in faces.validation}


# Tags ------------------------------------------------------------------------------------------------------------

BOORU = "1girl, solo, long_hair, blue_eyes, ^_^, (o)_(o), looking_at_viewer"
TAGS_ALONE = ("1girl", "solo", "long_hair", "o_o")
KINDS = {
    "booru": ([(BOORU,)] * 5, "tags"),
    "several lines of tags": ([(BOORU, "1boy, hat, school_uniform")] * 5, "tags"),
    "four of five": ([(BOORU,)] * 4 + [("A girl with long hair.",)], "tags"),
    "seven of ten": ([(BOORU,)] * 7 + [("A girl with long hair.",)] * 3, "sentences"),
    "two parts": ([("1girl, solo",)] * 5, "sentences"),
    "parts of four words": ([("a girl with hair, a man with hats, the end of days",)] * 5, "sentences"),
    "a sentence's end": ([("manga, hair, a girl.",)] * 5, "sentences"),
    "a sentence's end inside": ([("manga. Long hair, eyes, a girl",)] * 5, "sentences"),
    "a sentence's end in Japanese": ([("manga, hair, 少女。",)] * 5, "sentences"),
    "a name with a point": ([("1girl, dr.stone, k-on!, solo",)] * 5, "tags"),
    "prose with commas": ([("A girl, her hair is long, she looks left, it is very calm",)] * 5, "sentences"),
    "one tag each": ([TAGS_ALONE] * 5, "one tag each"),
    "one tag each, but two a face": ([TAGS_ALONE[:2]] * 5, "sentences"),
    "sentences without an end": (
        [("a girl with long dark hair", "she looks at you", "a calm and quiet mood")] * 5,
        "sentences",
    ),
    "nothing": ([], "sentences"),
}


@pytest.mark.parametrize("case", KINDS)
def test_tags_are_told_from_sentences_for_all_faces_alike(case):
    faces, kind = KINDS[case]
    assert kind_of(faces) == kind


def test_the_demo_s_captions_are_sentences(demo_faces):
    entries = json.loads((demo_faces / "modified_face_250.json").read_text(encoding="utf-8"))
    assert kind_of([tuple(entry["captions"]) for entry in entries]) == "sentences"


def test_underscores_become_spaces_but_emoticons_stay():
    faces = re.split(" ", "^_^ >_< o_o O_o @_@ =_= ._. ;_; T_T x_x 0_0 3_3 +_+ |_| ||_|| (o)_(o) <o>_<o> u_u")
    tidied = tidy_tags((", ".join(faces),), "tags")[0]
    assert split_tags(tidied) == faces
    assert tidy_tags(("long_hair ,v_neck,, _solo_, two_words_more",), "tags") == (
        "long hair, v neck, solo, two words more",
    )
    assert tidy_tags(TAGS_ALONE, "one tag each") == ("1girl, solo, long hair, o_o",)
    assert tidy_tags(("A girl_name, smiling.",), "tags") == ("A girl_name, smiling.",)  # a sentence among the tags


def test_shuffles_have_the_same_tags_in_at_most_four_orders_with_the_first_kept():
    tags = [f"tag{number}" for number in range(12)]
    for keep in (0, 1, 5):
        found = shuffles((", ".join(tags),), keep, "face")
        assert len(found) == len(set(found)) == MAX_VARIANTS - 1
        for text in found:
            assert split_tags(text)[:keep] == tags[:keep] and sorted(split_tags(text)) == sorted(tags)
            assert split_tags(text) != tags
    assert shuffles(("a, b, c",), 1, "face") == ["a, c, b"]  # there is no other
    assert shuffles(("a, b",), 1, "face") == shuffles(("a, b, c",), 3, "face") == []
    assert len(shuffles(("a, b, c, d", "e, f, g, h"), 1, "face")) == 2  # four in all
    assert shuffles(tuple(f"{n}, b, c, d" for n in range(6)), 1, "face") == []
    assert shuffles(("A cat, a dog, a bird.",), 1, "face") == []


def test_shuffles_depend_on_the_picture_alone(tmp_path):
    captions = [BOORU] * 3
    faces = make_faces(tmp_path, captions)
    random.seed(5)
    np.random.seed(5)
    assert make_faces(tmp_path, captions, seed=3).texts == faces.texts
    code = "from training.captions import shuffles; print(shuffles(('a, b, c, d, e, f, g',), 1, 'seed'))"
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed},
        ).stdout
        for seed in "12"
    ]
    assert runs[0] == runs[1] and len(runs[0]) > 20
    orders = [tuple(faces.texts[index] for index in indices) for indices in faces.text_indices]
    assert len(set(orders)) == 3 and len({order[0] for order in orders}) == 1  # each picture has its own shuffles


def test_tags_become_variants_and_the_report_says_what_was_decided(tmp_path, tokenizer):
    faces = make_faces(tmp_path / "tags", [BOORU] * 5)
    faces.make_texts(tokenizer)
    clean = "1girl, solo, long hair, blue eyes, ^_^, (o)_(o), looking at viewer"
    assert [face.captions for face in faces.faces] == [(clean,)] * 5
    for indices, first in zip(faces.text_indices, faces.first_text, strict=True):
        assert len(indices) == 4 and faces.texts[first] == faces.texts[indices[0]] == clean
        assert all(faces.texts[index].startswith("1girl, ") for index in indices)
    assert "lists of tags; underscores become spaces, shuffled, all but the first" in faces.report()
    still = make_faces(tmp_path / "tags", [BOORU] * 5, shuffle_tags=False)
    assert still.texts == ["", clean] and "in their order" in still.report()
    two = make_faces(tmp_path / "tags", [BOORU] * 5, keep_tags=2)
    assert "shuffled, all but the first 2\n" in two.report()
    loose = make_faces(tmp_path / "tags", [BOORU] * 5, keep_tags=0)
    assert "underscores become spaces, shuffled\n" in loose.report()
    assert not all(text.startswith("1girl") for text in loose.texts[1:])
    lone = make_faces(tmp_path / "lone", [list(TAGS_ALONE)] * 5)
    assert [face.captions for face in lone.faces] == [("1girl, solo, long hair, o_o",)] * 5
    assert "one tag each, joined into one list a face" in lone.report()
    assert "; sentences" in make_faces(tmp_path / "other", SENTENCES).report()


def test_the_trigger_word_comes_first_takes_its_tokens_and_changes_no_weight(tmp_path, tokenizer, count):
    captions = [[f"{text} {number}" for text in SENTENCES * 4] for number in range(9)] + ["rare heterochromia"]
    plain = make_faces(tmp_path, captions)
    faces = make_faces(tmp_path, captions, trigger_word="sks face")
    faces.make_texts(tokenizer)
    assert faces.texts[0] == "" and all(text.startswith("sks face, ") for text in faces.texts[1:])
    assert max(count(faces.texts)) <= 77
    assert all(text.count("sks") == 1 for text in faces.texts[1:])
    np.testing.assert_array_equal(faces.weights, plain.weights)
    assert "Trigger word: 'sks face' before every caption" in faces.report()
    assert "Trigger word" not in plain.report()

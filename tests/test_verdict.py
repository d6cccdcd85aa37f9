"""The sentence at the end, from facts; what the facts are made of. Whole runs: test_verdict_runs.py."""

import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, STYLES, run, write_faces
from PIL import Image

from evaluation.measures import colourfulness, stroke_directions
from evaluation.verdict import Facts, facts_of, is_falling, moved, two_styles, verdict

GOOD = Facts(
    learning_rate=5e-5,
    epochs=30,
    best_epoch=30,
    faces=225,
    held_out=25,
    losses=(0.07, 0.05),
    score=7.0,
    moved=0.9,
    style=0.8,
    whole=(0.9, 0.95),
)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "Style learnt, faces intact."),
        ({"is_falling": True}, "Style learnt, faces intact. More epochs may be better still."),
        ({"is_falling": True, "best_epoch": 20}, "Style learnt, faces intact."),
        (  # half of the style isn't learnt: what is smeared is the base's still
            {"style": 0.4, "whole": (0.17, 0.95)},
            "Style learnt in part: raise learning_rate (5e-05) or num_train_epochs (30).",
        ),
        ({"moved": 0.1}, "Hardly differs from the base: raise learning_rate (5e-05) or num_train_epochs (30)."),
        ({"moved": 0.1, "held_out": 4}, "Hardly differs from the base: raise learning_rate (5e-05) or num_train"),
        (  # the base's own pictures aren't whole faces in this artist's style, either
            {"moved": 0.3, "style": 0.1, "score": 0.4, "whole": (0.0, 0.95), "is_falling": True},
            "Hardly differs from the base: raise learning_rate (5e-05) or num_train_epochs (30).",
        ),
        (
            {"moved": 0.5, "style": 0.4, "whole": (0.1, 0.95)},
            "Style learnt in part: raise learning_rate (5e-05) or num_train_epochs (30).",
        ),
        (
            {"whole": (0.6, 0.95)},
            "Style learnt, but faces are smeared in 40 % of the pictures: lower learning_rate (5e-05), or show larger",
        ),
        ({"whole": (0.6, 0.95), "better": ((12, 0.8), (20, 0.65))}, "or take epoch 12 from candidates."),
        ({"copied": 6, "faces": 24, "copies": 0.3}, "Copies 6 of 24 training faces: fewer epochs, or more pictures."),
        ({"faces": 36, "held_out": 4}, "4 held out, 8 are needed: set validation_share = 0.2. Believe your eyes."),
        (
            {"faces": 16, "held_out": 4},
            "Too few faces to judge: 4 held out, 8 are needed: add faces. Believe your eyes.",
        ),
        ({"score": -1.2}, "Worse than the base: lower learning_rate (5e-05), to a quarter; but first see what"),
        ({"obeyed": 0.1}, "Style learnt, faces intact. Prompts are obeyed no better than by the base."),
        ({"losses": (0.07, 0.08)}, "Worse than the base"),
        ({"losses": (0.07, 0.08), "start": "start"}, "Worse than the start: lower"),
        ({"score": -1.2, "start": "start"}, "Worse than the base: lower"),  # its 0 is the base's
        ({"style": 0.3}, "Style learnt in part, faces intact. Raise learning_rate (5e-05) a little."),
        ({"style": -0.1, "whole": None}, "Style hardly learnt. Raise learning_rate (5e-05) a little."),
        ({"style": None, "moved": None, "whole": None, "score": None}, "Learnt, by the validation loss; no pictures"),
        ({"same_captions": True}, "faces intact. All captions are the same, so prompts make no difference."),
        ({"styles": (100, 125)}, "The faces are of two styles (100 and 125): train them apart."),
    ],
)
def test_each_finding_has_its_sentence(changes, expected):
    assert expected in verdict(dataclasses.replace(GOOD, **changes)).replace("40%", "40 %")


def test_pictures_that_are_the_base_s_have_not_moved_and_others_have_moved_by_about_one():
    generator = np.random.default_rng(0)
    base, others = generator.integers(0, 256, (2, 8, 16, 16, 3), dtype=np.uint8)
    assert moved(base, base) == 0 and 0.9 < moved(base, others) < 1.1


@pytest.mark.parametrize("seed", range(20))
def test_one_style_is_one_however_it_varies_and_two_are_two(seed):
    generator, grey = np.random.default_rng(seed), np.ones(60)
    one = generator.normal(0, 1, (60, 20)) * np.linspace(5, 0.1, 20)
    for values in (one, generator.uniform(0, 1, (60, 20)), generator.exponential(1, (60, 20)), np.ones((60, 20))):
        assert two_styles(values, grey) is None and two_styles(one, 40 * abs(values[:, 0])) is None
    few = generator.normal(0, 1, (8, 20))
    assert two_styles(few, few[:, 0]) is None  # a few fall apart by chance
    apart = np.r_[np.zeros(40), np.ones(20)][:, None] * generator.normal(0, 20, 20)
    assert sorted(two_styles(one + apart, grey)) == [20, 40]
    assert two_styles(one, np.r_[generator.normal(5, 1, 40), generator.normal(40, 3, 20)]) == (40, 20)
    assert two_styles(one, np.r_[grey[:57], 40 * grey[:3]]) is None  # three coloured ones


def test_any_two_of_four_styles_are_told_apart_and_none_is_split(tmp_path):
    def read(folder, count: int) -> tuple:
        files = sorted(folder.glob("*.png"))[:count]
        pictures = [np.asarray(Image.open(file).convert("RGB").resize((64, 64))) for file in files]
        return stroke_directions(pictures), colourfulness(np.stack(pictures))

    sets = [read(write_faces(name, tmp_path / name), 90) for name in STYLES]
    sets += [read(ROOT / "demo" / "faces", 90), read(ROOT / "demo" / "other_faces", 60)]
    assert all(two_styles(*one) is None for one in sets)
    for one, other in itertools.combinations(sets, 2):
        both = (np.concatenate(pair) for pair in zip(one, other, strict=True))
        assert sorted(two_styles(*both)) == sorted([len(one[0]), len(other[0])])


def test_a_loss_still_falls_only_if_learning_and_not_the_schedule_ended_it():
    rates = np.cumsum(1 + np.cos(np.linspace(0, np.pi, 30)))
    learning = [(0.0, 1.0), *((done, float(np.exp(-done / 5))) for done in rates)]  # done long before the end
    slow = [(0.0, 1.0), *((done, float(np.exp(-done / 500))) for done in rates)]
    worse = [(0.0, 1.0), *((done, 1 + done / 100) for done in rates)]
    assert not is_falling(learning) and is_falling(slow) and not is_falling(worse)


def test_a_run_s_last_line_is_its_verdict_made_of_what_the_run_was(tiny_config, capsys):
    """16 faces to train on, 4 held out; without metrics.csv nothing is said of learning that goes on."""
    summary = run(tiny_config, num_train_epochs=1, sample_prompts=("a face",), samples_per_prompt=1, sample_steps=1)
    assert capsys.readouterr().out.rstrip().splitlines()[-1] == summary["verdict"]
    assert summary["verdict"].startswith(("Too few faces to judge: 4 held out, 8 are needed", "Hardly differs"))
    assert not is_falling([(0.0, 1.0), (0.0, 0.5), (0.0, 0.2)])


@pytest.mark.parametrize(("passing", "expected"), [(0.75, (0.9, 0.75)), (0.5, None), (np.nan, None)])
def test_nothing_is_said_of_faces_by_a_judge_that_fails_real_ones(passing, expected):
    rng, is_copy = np.random.default_rng(0), np.zeros(4, bool)
    references = SimpleNamespace(names=[], layout=rng.random((20, 512)), line_art={"colourfulness": rng.random(20)})

    def scored(coherence):
        pixels = rng.integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
        features = SimpleNamespace(is_copy=is_copy, pixels=pixels)
        value = {"coherence": coherence, "points: style": 0.8, "points: adherence": 0.2}
        ends = SimpleNamespace(evidence=["adherence"])
        return SimpleNamespace(features=features, references=references, score=5.0, value=value, ends=ends)

    evaluation = SimpleNamespace(of_base=scored(0.0), references=references, judge_held_out=lambda: scored(passing))
    row = SimpleNamespace(epoch=0, loss=0.07)
    state = SimpleNamespace(history=[row], steps_per_epoch=1, epoch=1, best=row, start_loss=0.07)
    config = SimpleNamespace(learning_rate=1e-4, start_from="")
    dataset = SimpleNamespace(faces=[], train=[0] * 8, validation=[0] * 8)
    facts = facts_of(config, dataset, state, 1, [1e-4], evaluation, {1: scored(0.9), 2: scored(0.95)})
    assert (facts.whole, facts.better, facts.obeyed) == (expected, ((2, 0.95),), 0.2)

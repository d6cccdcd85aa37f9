"""The score: each part against its definition, then all of it on what it must put in order.

    python -m pytest tests/test_evaluate.py

tests/demo_lora holds the demo's LoRA at rank 4, after a quarter of its epochs and after all; write_demo_lora.py there
trains it anew.
"""

import itertools
import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageFilter, ImageOps
from scipy.stats import wasserstein_distance
from sklearn.metrics import balanced_accuracy_score

from dataset import MangaFaceDataset
from evaluation import measures, pictures
from evaluation.best_epoch import choose_best
from evaluation.measures import ATTRIBUTES, LINE_ART, asked_for, kernel, line_art
from evaluation.score import POINTS, Evaluation, Score, values
from train_manga_lora import DEMO, TrainingConfig
from training.pictures import load_image

DEMO_LORA = ROOT / "tests" / "demo_lora"


def flat(*colours) -> np.ndarray:
    """One 8 x 8 picture per colour."""
    return np.stack([np.full((8, 8, 3), colour, dtype=np.uint8) for colour in colours])


# The measures ----------------------------------------------------------------------------------------------------


def test_colourfulness_is_hasler_and_suesstrunk_s_formula():
    assert measures.colourfulness(flat((0, 0, 0), (128, 128, 128), (255, 255, 255))).tolist() == [0, 0, 0]
    picture = np.random.default_rng(0).integers(0, 256, (1, 9, 7, 3), dtype=np.uint8)
    pixels = [tuple(int(value) for value in pixel) for pixel in picture[0].reshape(-1, 3)]
    rg = [r - g for r, g, b in pixels]
    yb = [(r + g) / 2 - b for r, g, b in pixels]
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    variance = lambda values: mean([(value - mean(values)) ** 2 for value in values])  # noqa: E731
    expected = math.sqrt(variance(rg) + variance(yb)) + 0.3 * math.sqrt(mean(rg) ** 2 + mean(yb) ** 2)
    assert measures.colourfulness(picture)[0] == pytest.approx(expected)
    assert measures.colourfulness(flat((255, 0, 0)))[0] == pytest.approx(0.3 * math.hypot(255, 127.5))


def test_measuring_in_parts_changes_nothing():
    some = np.random.default_rng(5).integers(0, 256, (37, 8, 8, 3), dtype=np.uint8)
    for name, together in line_art(some).items():
        alone = [line_art(some[number : number + 1])[name][0] for number in range(37)]
        assert together == pytest.approx(alone), name


def test_shares_count_dark_and_two_tone_pixels_and_edges_are_strokes_not_blur():
    picture = flat((255, 255, 255), (255, 255, 255), (0, 0, 0), (128, 128, 128))
    picture[0, :, :2] = 0
    picture[1] = np.linspace(0, 255, 8).astype(np.uint8)[None, :, None]  # blurred: a ramp
    measured = line_art(picture)
    assert measured["ink share"].tolist() == [0.25, 0.25, 1.0, 0.0]
    assert measured["bilevel share"].tolist() == [1.0, 0.25, 1.0, 0.0]
    stroke, blur, nothing, grey = measured["edge strength"]
    assert stroke == pytest.approx(0.5) and blur == pytest.approx(1 / 7, abs=0.01) and nothing == grey == 0


def test_pairwise_distance_is_the_rms_of_the_difference_in_brightness():
    some = np.random.default_rng(1).integers(0, 256, (5, 6, 6, 3), dtype=np.uint8)
    grey, distances = measures.luma(some), measures.pairwise_distances(some)
    for a, b in itertools.product(range(5), repeat=2):
        assert distances[a, b] == pytest.approx(math.sqrt(((grey[a] - grey[b]) ** 2).mean()), abs=1e-7)
    large = some.repeat(43, axis=1).repeat(43, axis=2)  # 258 pixels a side: averaged by threes
    assert measures.pairwise_distances(large) == pytest.approx(distances, abs=0.02)


def test_stroke_directions_tell_which_way_strokes_run_not_how_bright_they_are():
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::8] = stripes[:, 1::8] = 200
    vertical, paler, horizontal = measures.stroke_directions(
        np.stack([stripes, stripes // 2, stripes.transpose(1, 0, 2)])
    )
    assert np.linalg.norm(vertical) == pytest.approx(1)
    assert vertical @ paler == pytest.approx(1) and vertical @ horizontal < 0.1


def test_balanced_accuracy_is_the_library_s_and_never_is_half():
    rng = np.random.default_rng(2)
    seen, truth = rng.random((40, 3)) < 0.4, (rng.random((40, 3)) < 0.3).astype(float)
    expected = [balanced_accuracy_score(truth[:, i], seen[:, i]) for i in range(3)]
    assert measures.balanced_accuracy(seen, truth) == pytest.approx(expected)
    assert measures.balanced_accuracy(np.zeros((40, 3), dtype=bool), truth) == pytest.approx([0.5] * 3)
    twice = np.r_[np.full(20, 2.0), np.zeros(20)]  # weights count pictures
    halves = [balanced_accuracy_score(truth[:20, i], seen[:20, i]) for i in range(3)]
    assert measures.balanced_accuracy(seen, truth, twice) == pytest.approx(halves)
    truth[::2, 0] = math.nan  # not asked
    known = balanced_accuracy_score(truth[1::2, 0], seen[1::2, 0])
    assert measures.balanced_accuracy(seen, truth)[0] == pytest.approx(known)
    truth[:, 1] = 1
    assert math.isnan(measures.balanced_accuracy(seen, truth)[1])  # "no" was never asked for: no evidence


def test_half_of_the_prompts_ask_for_each_attribute_in_words_of_the_captions():
    prompts = json.loads((ROOT / "demo" / "attributes" / "prompts.json").read_text(encoding="utf-8"))
    assert len(prompts) == 288 and len(set(prompts)) >= 287
    entries = json.loads((ROOT / "demo" / "faces" / "modified_face_250.json").read_text(encoding="utf-8"))
    words = {word for entry in entries for caption in entry["captions"] for word in caption.lower().split()}
    for some in (prompts[: pictures.MAX_ATTRIBUTE_PROMPTS], prompts):
        asked = np.array([asked_for(prompt) for prompt in some])
        share = dict(zip(ATTRIBUTES, np.nanmean(asked, axis=0), strict=True))
        assert share.pop("smile") == pytest.approx(0.5, abs=0.04)  # only of the mouths that are told from a beard
        assert share == pytest.approx(dict.fromkeys(share, 0.5))
    asked_words = {word.strip(",") for prompt in prompts for word in prompt.lower().split()}
    assert asked_words <= {word.strip(",") for word in words}


def test_the_judge_of_attributes_is_right_on_19_of_20_renders_it_has_not_seen():
    _, accuracy = measures.load_attribute_network()
    assert set(accuracy) == set(ATTRIBUTES) and min(accuracy.values()) >= 0.95, accuracy


def test_clip_margins_are_those_of_the_library_s_own_preprocessing():
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    text, vision = {"vocab_size": 99, "eos_token_id": 98}, {"image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=small | text, vision_config=small | vision, projection_dim=16)).eval()
    ids = {"one": [1, 2, 98], "two": [3, 4, 98]}

    def tokenizer(texts, **_):
        some = torch.tensor([ids[text] for text in texts])
        return {"input_ids": some, "attention_mask": torch.ones_like(some)}

    drawn, texts = np.random.default_rng(3).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8), ["two", "one", "two"]
    margins = measures.clip_margins((tokenizer, model), drawn, texts)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pixels = processor([Image.fromarray(picture) for picture in drawn], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = model(**tokenizer(["one", "two"]), pixel_values=pixels)
    cosines = (output.image_embeds @ output.text_embeds.T).numpy()
    own, other = cosines[range(3), [1, 0, 1]], cosines[range(3), [0, 1, 0]]
    assert margins == pytest.approx(own - other, abs=2e-3)
    alone = measures.clip_margins((tokenizer, model), drawn, ["one"] * 3)
    assert np.isnan(alone).all()  # nothing to be nearer than


# Parts and points, on made-up features ---------------------------------------------------------------------------


def made_up(seed: int, count: int = 30, shift: float = 0.0) -> tuple:
    """(features, references, the sets behind their kernels): random numbers; a shift moves the pictures away."""
    rng = np.random.default_rng(seed)
    own, real = rng.normal(shift, 1, (count, 6)), rng.normal(0, 1, (50, 6))
    among = kernel(real, real)
    among = (among.sum() - np.trace(among)) / (50 * 49)
    texts = [f"prompt {number // 2}" for number in range(count)]
    distances = np.full((count, count), np.nan)
    for a, b in itertools.permutations(range(count), 2):
        if texts[a] == texts[b]:
            distances[a, b] = 0.3
    features = SimpleNamespace(
        pixels=np.zeros((count, 8, 8, 3), np.uint8),
        texts=texts,
        portraits=count,
        line_art={name: rng.normal(shift, 1, count) for name in LINE_ART},
        kernels={"latents": (kernel(own, own), kernel(own, real).mean(axis=1), among)},
        nearest=np.zeros(count, dtype=int),
        nearest_distance=rng.random(count),
        distances=distances,
        asked=None,
        seen=None,
        clip_margins=None,
    )
    references = SimpleNamespace(
        names=["face"] * 50,
        line_art={name: rng.normal(0, 1, 50) for name in LINE_ART},
        copy_distance=0.1,
        diversity=0.4,
        clip_margin=math.nan,
    )
    return features, references, own, real


def but(thing: SimpleNamespace, **changes) -> SimpleNamespace:
    return SimpleNamespace(**vars(thing) | changes)


def test_parts_are_their_formulas():
    features, references, own, real = made_up(0, shift=0.5)
    parts = values(features, references, np.ones(30))
    for name, floor in LINE_ART.items():
        spread = max(references.line_art[name].std(), floor)
        expected = wasserstein_distance(features.line_art[name], references.line_art[name]) / spread
        assert parts[f"style: {name}"] == pytest.approx(expected)
    k = lambda a, b: (a @ b / 6 + 1) ** 3  # noqa: E731
    mean = lambda pairs: sum(pairs) / len(pairs)  # noqa: E731
    expected = (
        mean([k(a, b) for a, b in itertools.permutations(own, 2)])
        + mean([k(a, b) for a, b in itertools.permutations(real, 2)])
        - 2 * mean([k(a, b) for a in own for b in real])
    )
    assert parts["set distance: latents"] == pytest.approx(expected)
    assert parts["novelty"] == (features.nearest_distance >= 0.1).mean()
    assert parts["diversity"] == pytest.approx(0.3 / 0.4)
    assert math.isnan(parts["adherence"])


def test_the_kernel_distance_of_two_draws_of_one_distribution_is_zero_on_average():
    def distances(seeds: int, shift: float) -> list[float]:
        drawn = (made_up(seed, shift=shift)[:2] for seed in range(seeds))
        return [values(*some, np.ones(30))["set distance: latents"] for some in drawn]

    of_one = distances(200, 0.0)
    assert abs(np.mean(of_one)) < 2.6 * np.std(of_one) / math.sqrt(200)  # unbiased: some are negative
    assert min(of_one) < 0
    assert np.mean(distances(20, 0.5)) > 5 * np.std(of_one)


def test_a_missing_part_is_left_out_and_said_never_taken_for_nothing_or_all():
    features, references, *_ = made_up(1)
    score = Score(features, references, made_up(2, shift=1.0)[0])
    parts = ("style", "set distance", "novelty", "diversity")
    weighted = sum(POINTS[part] * score.value[f"points: {part}"] for part in parts)
    assert score.score == pytest.approx(10 * weighted / sum(POINTS[part] for part in parts))
    assert score.as_json()["adherence"] == "n/a"
    single = but(features, texts=[str(number) for number in range(30)], distances=np.full((30, 30), np.nan))
    assert Score(single, references, single).as_json()["diversity"] == "n/a"  # one seed a prompt
    alone = but(references, copy_distance=math.nan)  # one face has no neighbour to compare with
    assert Score(features, alone, features).as_json()["novelty"] == "n/a"
    margins = but(features, clip_margins=np.full(30, 0.02))
    for of_faces, expected in ((0.04, pytest.approx(0.5)), (-0.04, None)):  # CLIP can't tell these faces' captions
        found = Score(margins, but(references, clip_margin=of_faces), margins).as_json()["adherence"]
        assert found == "n/a" if expected is None else found["value"] == expected
    entry = score.as_json()["style"]
    assert entry["n"] == 30 and entry["interval"][0] <= entry["value"] <= entry["interval"][1]
    assert json.loads(json.dumps(score.as_json(), allow_nan=False))


def test_the_highest_score_wins_and_what_it_beats_only_by_chance_wins_if_earlier():
    base, references, *_ = made_up(9, shift=1.5)
    good, alike = made_up(3, shift=0.0)[0], made_up(4, shift=0.0)[0]
    bad = made_up(5, shift=1.0)[0]
    scored = {epoch: Score(features, references, base) for epoch, features in {4: bad, 6: good, 9: alike}.items()}
    assert scored[6].beats(scored[4]) and scored[9].beats(scored[4])
    assert not scored[6].beats(scored[9]) and not scored[9].beats(scored[6])
    epoch, reason = choose_best([4, 6, 9], scored)
    assert epoch == 6 and f"{scored[6].score:.2f}" in reason
    assert choose_best([4, 6], {4: scored[6], 6: scored[6]})[0] == 4  # a tie
    assert choose_best([4, 6], {4: scored[4], 6: scored[6]})[0] == 6
    assert choose_best([4, 6], {})[0] == 4 and choose_best([4], scored)[0] == 4


# All of it, on the demo: what must come out above what -----------------------------------------------------------


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """(evaluation, scores of the LoRA after a quarter of its epochs and after all, of held-out faces)."""
    config = TrainingConfig(
        dataset_dir=str(ROOT / "demo" / "faces"),
        json_file=str(ROOT / "demo" / "faces" / "modified_face_250.json"),
        output_dir=str(tmp_path_factory.mktemp("out")),
        cache_dir=str(tmp_path_factory.mktemp("cache")),
        pretrained_model=str(ROOT / "demo" / "base"),
        resolution=64,
        num_train_epochs=8,
        learning_rate=5e-4,
        lora_rank=4,
        lora_alpha=8,
        validation_share=0.1,
        sample_prompts=DEMO["sample_prompts"],
        samples_per_prompt=2,
        sample_steps=10,
        guidance_scale=7.5,
        seed=0,
        demo=True,
    )
    evaluation = Evaluation(config, MangaFaceDataset.from_config(config), ROOT / "demo" / "base", torch.device("cpu"))
    quarter, finished = (evaluation.judge(DEMO_LORA / f"{name}.safetensors") for name in ("quarter", "finished"))
    return evaluation, quarter, finished, evaluation.judge_held_out()


def apart(better, worse, name="points: score") -> bool:
    """Whether the gap is beyond its interval: paired where prompts are the same; else the intervals don't meet."""
    if better.features.texts == worse.features.texts:
        return better.beats(worse, name)
    return better.interval(name)[0] > worse.interval(name)[1]


def test_base_below_a_quarter_of_the_training_below_all_of_it_below_real_faces(judged):
    evaluation, quarter, finished, held_out = judged
    assert apart(quarter, evaluation.of_base)
    assert apart(finished, quarter)
    assert apart(held_out, finished)
    for part in ("style", "set distance"):
        assert apart(quarter, evaluation.of_base, f"points: {part}"), part
        assert apart(finished, quarter, f"points: {part}"), part
        assert held_out.value[f"points: {part}"] > finished.value[f"points: {part}"], part
    assert apart(held_out, finished, "points: style") and apart(held_out, finished, "points: adherence")
    # Adherence itself hardly moves: the base knows these words already, and the LoRA only learns to draw in ink.
    assert finished.value["adherence"] > evaluation.of_base.value["adherence"] - 0.05


def test_the_judge_of_attributes_sees_in_real_faces_what_their_captions_say(judged):
    evaluation, *_ = judged
    faces = [evaluation.dataset.faces[face] for face in evaluation.dataset.train[:100]]
    pixels = torch.stack([load_image(face.path, None, (64, 64)) for face in faces])
    vae = evaluation.pipe.vae
    with torch.no_grad():
        drawn = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in pixels.split(10)])
        seen = torch.cat([evaluation.network(part) for part in drawn.split(10)]).numpy() > 0
    asked = np.array([asked_for(" ".join(face.captions)) for face in faces])
    accuracy = dict(zip(ATTRIBUTES, measures.balanced_accuracy(seen, asked), strict=True))
    small = {name: accuracy.pop(name) for name in ("earrings", "freckles")}  # hidden by hair, or erased by the VAE
    assert min(accuracy.values()) > 0.9 and min(small.values()) > 0.6, (accuracy, small)


def test_pictures_of_other_prompts_lose_adherence_not_style_or_set_distance(judged):
    evaluation, _, finished, _ = judged
    order = list(range(len(evaluation.jobs)))
    tail = order[finished.features.portraits :]
    random.Random(0).shuffle(tail)
    order[finished.features.portraits :] = tail
    mixed = evaluation.judge_pictures(finished.features.pixels[order])
    assert apart(finished, mixed, "points: adherence")
    for part in ("style", "set distance"):
        assert mixed.value[f"points: {part}"] == pytest.approx(finished.value[f"points: {part}"], abs=1e-6)


def changed(score, change) -> np.ndarray:
    return np.stack([np.asarray(change(Image.fromarray(picture))) for picture in score.features.pixels])


def tinted(picture):
    return Image.blend(picture, Image.new("RGB", picture.size, (250, 90, 120)), 0.25)


def blurred(picture):
    return picture.filter(ImageFilter.GaussianBlur(1.5))


@pytest.mark.parametrize("damage, part", [(tinted, "style"), (blurred, "style")])
def test_colour_leak_and_blur_cost_points(judged, damage, part):
    evaluation, _, finished, _ = judged
    damaged = evaluation.judge_pictures(changed(finished, damage))
    assert apart(finished, damaged) and apart(finished, damaged, f"points: {part}")


def test_collapse_costs_points(judged):
    evaluation, _, finished, _ = judged
    one = np.repeat(finished.features.pixels[:1], len(finished.features.pixels), axis=0)
    collapsed = evaluation.judge_pictures(one)
    assert apart(finished, collapsed)
    for part in ("diversity", "adherence"):
        assert apart(finished, collapsed, f"points: {part}"), part
    assert collapsed.value["points: diversity"] < 1e-6


def test_a_planted_copy_and_a_mirrored_one_are_named_and_nothing_else_is(judged):
    evaluation, _, finished, held_out = judged
    assert finished.as_json()["copies"] == [] == held_out.as_json()["copies"]
    pixels = finished.features.pixels.copy()
    pixels[3] = evaluation.references.pixels[17]
    pixels[5] = np.asarray(ImageOps.mirror(Image.fromarray(evaluation.references.pixels[42])))
    copied = evaluation.judge_pictures(pixels)
    found = {copy["face"] for copy in copied.as_json()["copies"]}
    assert found == {evaluation.references.names[17], evaluation.references.names[42]}
    assert copied.value["novelty"] == pytest.approx(1 - 2 / finished.features.portraits)


def test_the_table_shows_every_part_and_the_file_value_interval_and_n(judged, tmp_path):
    evaluation, _, finished, _ = judged
    table = evaluation.write(tmp_path, finished)
    for name in (*LINE_ART, *POINTS, *ATTRIBUTES, "quality score", "copies of training faces: 0"):
        assert name in table, name
    scores = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    for name in (*POINTS, "score"):
        for of in ("base", "lora"):
            assert {"value", "interval", "n"} <= scores[of][name].keys(), name
    assert scores["held_out_faces"]["diversity"] == "n/a"  # every face has a caption of its own
    assert Image.open(tmp_path / "before_after.png").width > 1000


# Pictures --------------------------------------------------------------------------------------------------------


def test_a_contact_sheet_shows_every_picture_in_its_place():
    rows = [[np.full((16, 16, 3), 40 * row + 10 * column, dtype=np.uint8) for column in range(3)] for row in range(5)]
    sheet = np.asarray(pictures.contact_sheet(rows, ["a", "b", "c"], ["a caption"] * 5))
    for row, column in itertools.product(range(5), range(3)):
        block, line = divmod(row, 3)  # five rows: two blocks of three and two
        left = 16 + block * (3 * pictures.TILE + 16) + column * pictures.TILE
        top = 36 + line * (pictures.TILE + 40)
        assert (sheet[top + 50, left + 50] == 40 * row + 10 * column).all()

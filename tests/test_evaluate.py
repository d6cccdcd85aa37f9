"""The score: each part against its definition, then all of it on what it must put in order.

    python -m pytest tests/test_evaluate.py

tests/demo_lora holds the demo's LoRA at rank 4, after a quarter of its epochs and after all; write_demo_lora.py there
trains it anew.
"""

import dataclasses
import itertools
import json
import math
import random

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageFilter, ImageOps
from scipy.stats import wasserstein_distance
from sklearn.metrics import balanced_accuracy_score

import evaluate_lora
import train_manga_lora
from dataset import MangaFaceDataset, load_image
from evaluate_lora import ATTRIBUTES, POINTS, asked_for

DEMO_LORA = ROOT / "tests" / "demo_lora"


def flat(*colours) -> np.ndarray:
    """One 8 x 8 picture per colour."""
    return np.stack([np.full((8, 8, 3), colour, dtype=np.uint8) for colour in colours])


# The measures ----------------------------------------------------------------------------------------------------


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


def test_measuring_in_parts_changes_nothing():
    pictures = np.random.default_rng(5).integers(0, 256, (37, 8, 8, 3), dtype=np.uint8)
    together = evaluate_lora.measure(pictures)
    for name, values in together.items():
        alone = [evaluate_lora.measure(pictures[number : number + 1])[name][0] for number in range(37)]
        assert values == pytest.approx(alone), name


def test_shares_count_dark_and_two_tone_pixels_and_edge_strength_sees_strokes_not_blur():
    picture = flat((255, 255, 255), (255, 255, 255), (0, 0, 0), (128, 128, 128))
    picture[0, :, :2] = 0
    picture[1] = np.linspace(0, 255, 8).astype(np.uint8)[None, :, None]  # blurred: a ramp
    assert evaluate_lora.ink_share(picture).tolist() == [0.25, 0.25, 1.0, 0.0]
    assert evaluate_lora.bilevel_share(picture).tolist() == [1.0, 0.25, 1.0, 0.0]
    stroke, blur, nothing, grey = evaluate_lora.edge_strength(picture)
    assert stroke == pytest.approx(0.5) and blur == pytest.approx(1 / 7, abs=0.01) and nothing == grey == 0


def test_pairwise_distance_is_the_root_mean_square_of_the_difference_in_brightness():
    pictures = np.random.default_rng(1).integers(0, 256, (5, 6, 6, 3), dtype=np.uint8)
    grey, distances = evaluate_lora.luma(pictures), evaluate_lora.pairwise_distances(pictures)
    for a, b in itertools.product(range(5), repeat=2):
        assert distances[a, b] == pytest.approx(math.sqrt(((grey[a] - grey[b]) ** 2).mean()), abs=1e-7)
    large = pictures.repeat(43, axis=1).repeat(43, axis=2)  # 258 pixels a side: averaged by threes
    assert evaluate_lora.pairwise_distances(large) == pytest.approx(distances, abs=0.02)


def test_stroke_directions_tell_which_way_strokes_run_and_not_how_bright_they_are():
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::8] = stripes[:, 1::8] = 200
    vertical, paler, horizontal = evaluate_lora.stroke_directions(
        np.stack([stripes, stripes // 2, stripes.transpose(1, 0, 2)])
    )
    assert np.linalg.norm(vertical) == pytest.approx(1)
    assert vertical @ paler == pytest.approx(1) and vertical @ horizontal < 0.1


def test_balanced_accuracy_is_the_library_s_and_never_is_half():
    rng = np.random.default_rng(2)
    says, truth = rng.random((40, 3)) < 0.4, (rng.random((40, 3)) < 0.3).astype(float)
    expected = [balanced_accuracy_score(truth[:, i], says[:, i]) for i in range(3)]
    assert evaluate_lora.balanced_accuracy(says, truth) == pytest.approx(expected)
    assert evaluate_lora.balanced_accuracy(np.zeros((40, 3), dtype=bool), truth) == pytest.approx([0.5] * 3)
    twice = np.r_[np.full(20, 2.0), np.zeros(20)]  # weights count pictures
    halves = [balanced_accuracy_score(truth[:20, i], says[:20, i]) for i in range(3)]
    assert evaluate_lora.balanced_accuracy(says, truth, twice) == pytest.approx(halves)
    truth[::2, 0] = math.nan  # not asked
    known = balanced_accuracy_score(truth[1::2, 0], says[1::2, 0])
    assert evaluate_lora.balanced_accuracy(says, truth)[0] == pytest.approx(known)
    truth[:, 1] = 1
    assert math.isnan(evaluate_lora.balanced_accuracy(says, truth)[1])  # "no" was never asked for: no evidence


def test_attribute_prompts_ask_for_each_attribute_in_half_of_them_in_words_of_the_captions():
    prompts = json.loads((ROOT / "demo" / "attributes" / "prompts.json").read_text(encoding="utf-8"))
    assert len(prompts) == 288 and len(set(prompts)) >= 287
    entries = json.loads((ROOT / "demo" / "faces" / "modified_face_250.json").read_text(encoding="utf-8"))
    words = {word for entry in entries for caption in entry["captions"] for word in caption.lower().split()}
    for some in (prompts[: evaluate_lora.MAX_ATTRIBUTE_PROMPTS], prompts):
        asked = np.array([asked_for(prompt) for prompt in some])
        share = dict(zip(ATTRIBUTES, np.nanmean(asked, axis=0), strict=True))
        assert share.pop("smile") == pytest.approx(0.5, abs=0.04)  # only of the mouths that are told from a beard
        assert share == pytest.approx(dict.fromkeys(share, 0.5))
    asked_words = {word.strip(",") for prompt in prompts for word in prompt.lower().split()}
    assert asked_words <= {word.strip(",") for word in words}


def test_the_judge_of_attributes_is_right_on_renders_it_has_not_seen_at_least_19_times_of_20():
    _, accuracy = evaluate_lora.load_attribute_network(ROOT / "demo" / "attributes")
    assert set(accuracy) == set(ATTRIBUTES) and min(accuracy.values()) >= 0.95, accuracy


def test_clip_margins_are_those_of_the_library_s_own_preprocessing():
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = CLIPModel(CLIPConfig(
        text_config=small | {"vocab_size": 99, "eos_token_id": 98}, projection_dim=16,
        vision_config=small | {"image_size": 32, "patch_size": 8},
    )).eval()  # fmt: skip
    ids = {"one": [1, 2, 98], "two": [3, 4, 98]}

    def tokenizer(texts, **_):
        some = torch.tensor([ids[text] for text in texts])
        return {"input_ids": some, "attention_mask": torch.ones_like(some)}

    pictures, texts = np.random.default_rng(3).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8), ["two", "one", "two"]
    margins = evaluate_lora.clip_margins((tokenizer, model), pictures, texts)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pixels = processor([Image.fromarray(picture) for picture in pictures], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = model(**tokenizer(["one", "two"]), pixel_values=pixels)
    cosines = (output.image_embeds @ output.text_embeds.T).numpy()
    own, other = cosines[range(3), [1, 0, 1]], cosines[range(3), [0, 1, 0]]
    assert margins == pytest.approx(own - other, abs=2e-3)
    alone = evaluate_lora.clip_margins((tokenizer, model), pictures, ["one"] * 3)
    assert np.isnan(alone).all()  # nothing to be nearer than


# Parts and points, on made-up evidence --------------------------------------------------------------------------


def made_up(seed: int, count: int = 30, shift: float = 0.0) -> tuple:
    """(Evidence, Faces) of random numbers; a shift moves the pictures away from the faces."""
    rng = np.random.default_rng(seed)
    own, real = rng.normal(shift, 1, (count, 6)), rng.normal(0, 1, (50, 6))
    among = evaluate_lora.kernel(real, real)
    among = (among.sum() - np.trace(among)) / (50 * 49)
    kernels = {"latents": (evaluate_lora.kernel(own, own), evaluate_lora.kernel(own, real).mean(axis=1), among)}
    measures = {name: rng.normal(shift, 1, count) for name in evaluate_lora.LINE_ART}
    texts = [f"prompt {number // 2}" for number in range(count)]
    distances = np.full((count, count), np.nan)
    for a, b in itertools.permutations(range(count), 2):
        if texts[a] == texts[b]:
            distances[a, b] = 0.3
    evidence = evaluate_lora.Evidence(
        np.zeros((count, 8, 8, 3), np.uint8), texts, measures, kernels, np.zeros(count, dtype=int), rng.random(count),
        distances, None, None, None,
    )  # fmt: skip
    of_faces = {name: rng.normal(0, 1, 50) for name in evaluate_lora.LINE_ART}
    faces = evaluate_lora.Faces(
        ["face"] * 50, real, np.arange(50), np.zeros((1, 8, 8, 3), np.uint8), of_faces, copy_distance=0.1,
        diversity=0.4, clip_margin=math.nan,
    )  # fmt: skip
    return evidence, faces, own, real


def test_parts_are_their_formulas():
    evidence, faces, own, real = made_up(0, shift=0.5)
    values = evaluate_lora.values(evidence, faces, np.ones(30))
    for name, floor in evaluate_lora.LINE_ART.items():
        spread = max(faces.measures[name].std(), floor)
        expected = wasserstein_distance(evidence.measures[name], faces.measures[name]) / spread
        assert values[f"style: {name}"] == pytest.approx(expected)
    k = lambda a, b: (a @ b / 6 + 1) ** 3  # noqa: E731
    mean = lambda pairs: sum(pairs) / len(pairs)  # noqa: E731
    expected = (
        mean([k(a, b) for a, b in itertools.permutations(own, 2)])
        + mean([k(a, b) for a, b in itertools.permutations(real, 2)])
        - 2 * mean([k(a, b) for a in own for b in real])
    )
    assert values["set distance: latents"] == pytest.approx(expected)
    assert values["novelty"] == (evidence.nearest_distance >= 0.1).mean()
    assert values["diversity"] == pytest.approx(0.3 / 0.4)
    assert math.isnan(values["adherence"])


def test_the_kernel_distance_of_two_draws_from_one_distribution_is_zero_on_average():
    distances = [evaluate_lora.values(*made_up(seed)[:2], np.ones(30))["set distance: latents"] for seed in range(200)]
    assert abs(np.mean(distances)) < 2.6 * np.std(distances) / math.sqrt(200)  # unbiased: some are negative
    assert min(distances) < 0
    assert np.mean([evaluate_lora.values(*made_up(seed, shift=0.5)[:2], np.ones(30))["set distance: latents"]
                    for seed in range(20)]) > 5 * np.std(distances)  # fmt: skip


def test_missing_evidence_is_left_out_and_said_never_taken_for_nothing_or_for_everything():
    evidence, faces, *_ = made_up(1)
    judgement = evaluate_lora.Judgement(evidence, faces, made_up(2, shift=1.0)[0])
    parts = ("style", "set distance", "novelty", "diversity")
    weighted = sum(POINTS[part] * judgement.value[f"points: {part}"] for part in parts)
    assert judgement.score == pytest.approx(10 * weighted / sum(POINTS[part] for part in parts))
    assert judgement.as_json(faces)["adherence"] == "n/a"
    single = dataclasses.replace(evidence, texts=[str(number) for number in range(30)],
                                 distances=np.full((30, 30), np.nan))  # fmt: skip
    assert evaluate_lora.Judgement(single, faces, single).as_json(faces)["diversity"] == "n/a"  # one seed a prompt
    alone = dataclasses.replace(faces, copy_distance=math.nan)  # one face has no neighbour to compare with
    assert evaluate_lora.Judgement(evidence, alone, evidence).as_json(alone)["novelty"] == "n/a"
    margins = dataclasses.replace(evidence, clip_margins=np.full(30, 0.02))
    for of_faces, expected in ((0.04, pytest.approx(0.5)), (-0.04, None)):  # CLIP can't tell these faces' captions
        read = dataclasses.replace(faces, clip_margin=of_faces)
        found = evaluate_lora.Judgement(margins, read, margins).as_json(read)["adherence"]
        assert found == "n/a" if expected is None else found["value"] == expected
    entry = judgement.as_json(faces)["style"]
    assert entry["n"] == 30 and entry["interval"][0] <= entry["value"] <= entry["interval"][1]
    assert json.loads(json.dumps(judgement.as_json(faces), allow_nan=False))


def test_the_highest_score_wins_and_what_it_beats_by_no_more_than_chance_wins_if_earlier():
    base, faces, *_ = made_up(9, shift=1.5)
    good, alike = made_up(3, shift=0.0)[0], made_up(4, shift=0.0)[0]
    bad = made_up(5, shift=1.0)[0]
    judge = {epoch: evaluate_lora.Judgement(evidence, faces, base)
             for epoch, evidence in {4: bad, 6: good, 9: alike}.items()}  # fmt: skip
    assert judge[6].beats(judge[4]) and judge[9].beats(judge[4])
    assert not judge[6].beats(judge[9]) and not judge[9].beats(judge[6])
    epoch, reason = evaluate_lora.choose_best([4, 6, 9], judge)
    assert epoch == 6 and f"{judge[6].score:.2f}" in reason
    assert evaluate_lora.choose_best([4, 6], {4: judge[6], 6: judge[6]})[0] == 4  # a tie
    assert evaluate_lora.choose_best([4, 6], {4: judge[4], 6: judge[6]})[0] == 6
    assert evaluate_lora.choose_best([4, 6], {})[0] == 4 and evaluate_lora.choose_best([4], judge)[0] == 4


# All of it, on the demo: what must come out above what -----------------------------------------------------------


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """(evaluation, judgements of the LoRA after a quarter of its epochs and after all, of held-out faces)."""
    constants = train_manga_lora.DEMO | {
        "demo": True, "sample_steps": 10, "cache_dir": str(tmp_path_factory.mktemp("cache")),
    }  # fmt: skip
    constants = dataclasses.asdict(train_manga_lora.TrainingConfig(**constants))
    faces = MangaFaceDataset(constants["dataset_dir"], constants["json_file"], constants["resolution"])
    evaluation = evaluate_lora.Evaluation(constants, faces, ROOT / "demo" / "base", torch.device("cpu"))
    quarter, finished = (evaluation.judge(DEMO_LORA / f"{name}.safetensors") for name in ("quarter", "finished"))
    return evaluation, quarter, finished, evaluation.judge_held_out()


def apart(better, worse, name="points: score") -> bool:
    """Whether the gap is beyond its interval: paired where prompts are the same; else the intervals don't meet."""
    if better.evidence.texts == worse.evidence.texts:
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


def test_the_judge_of_attributes_sees_in_the_real_faces_what_their_captions_say(judged):
    evaluation, *_ = judged
    held_out = evaluation.dataset.train[:100]
    pixels = torch.stack([load_image(evaluation.dataset.samples[index].path, 64) for index in held_out])
    vae = evaluation.pipe.vae
    with torch.no_grad():
        drawn = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in pixels.split(10)])
        says = torch.cat([evaluation.network(part) for part in drawn.split(10)]).numpy() > 0
    asked = np.array([asked_for(" ".join(evaluation.dataset.samples[index].captions)) for index in held_out])
    accuracy = dict(zip(ATTRIBUTES, evaluate_lora.balanced_accuracy(says, asked), strict=True))
    small = {name: accuracy.pop(name) for name in ("earrings", "freckles")}  # hidden by hair, or erased by the VAE
    assert min(accuracy.values()) > 0.9 and min(small.values()) > 0.6, (accuracy, small)


def test_pictures_of_other_prompts_lose_adherence_and_nothing_of_style_or_set_distance(judged):
    evaluation, _, finished, _ = judged
    order = list(range(len(evaluation.jobs)))
    tail = order[finished.evidence.portraits :]
    random.Random(0).shuffle(tail)
    order[finished.evidence.portraits :] = tail
    mixed = evaluation.judge_pictures(finished.evidence.pixels[order])
    assert apart(finished, mixed, "points: adherence")
    for part in ("style", "set distance"):
        assert mixed.value[f"points: {part}"] == pytest.approx(finished.value[f"points: {part}"], abs=1e-6)


def changed(judgement, change) -> np.ndarray:
    return np.stack([np.asarray(change(Image.fromarray(picture))) for picture in judgement.evidence.pixels])


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
    one = np.repeat(finished.evidence.pixels[:1], len(finished.evidence.pixels), axis=0)
    collapsed = evaluation.judge_pictures(one)
    assert apart(finished, collapsed)
    for part in ("diversity", "adherence"):
        assert apart(finished, collapsed, f"points: {part}"), part
    assert collapsed.value["points: diversity"] < 1e-6


def test_a_planted_copy_and_its_mirror_are_flagged_with_their_faces_and_nothing_else_is(judged):
    evaluation, _, finished, held_out = judged
    assert finished.as_json(evaluation.faces)["copies"] == [] == held_out.as_json(evaluation.faces)["copies"]
    pixels = finished.evidence.pixels.copy()
    pixels[3] = evaluation.faces.pixels[17]
    pixels[5] = np.asarray(ImageOps.mirror(Image.fromarray(evaluation.faces.pixels[42])))
    copied = evaluation.judge_pictures(pixels)
    found = {copy["face"] for copy in copied.as_json(evaluation.faces)["copies"]}
    assert found == {evaluation.faces.names[17], evaluation.faces.names[42]}
    assert copied.value["novelty"] == pytest.approx(1 - 2 / finished.evidence.portraits)


def test_the_table_shows_every_part_and_the_file_holds_value_interval_and_n(judged, tmp_path):
    evaluation, _, finished, _ = judged
    table = evaluate_lora.write_evaluation(tmp_path, evaluation, finished)
    for name in (*evaluate_lora.LINE_ART, *POINTS, *ATTRIBUTES, "quality score", "copies of training faces: 0"):
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
    sheet = np.asarray(evaluate_lora.contact_sheet(rows, ["a", "b", "c"], ["a caption"] * 5))
    for row, column in itertools.product(range(5), range(3)):
        block, line = divmod(row, 3)  # five rows: two blocks of three and two
        left = 16 + block * (3 * evaluate_lora.TILE + 16) + column * evaluate_lora.TILE
        top = 36 + line * (evaluate_lora.TILE + 40)
        assert (sheet[top + 50, left + 50] == 40 * row + 10 * column).all()

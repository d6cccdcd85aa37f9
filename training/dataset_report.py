"""Look before you train: OUTPUT/dataset.html, every face as the network sees it, and what may go wrong.

One file that fetches nothing. Captions and names are foreign text: all of it is escaped.
"""

import base64
import contextlib
import json
import math
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path
from string import Template

import torch
from PIL import Image
from tqdm import tqdm

from dataset import FEWEST, MUCH_CUT, MangaFaceDataset, to_hold_out_enough
from training.bases import Unreachable, find_configs
from training.files import write_atomic
from training.folder import PAGE
from training.layouts import shown, some_of
from training.pictures import to_bytes

FEW_FACES, FEW_STEPS, ENOUGH_STEPS = 20, 200, 1000
USUAL_RATES = (1e-6, 5e-4)  # of a LoRA on Stable Diffusion 1.5
MUCH_COLOUR = 0.02  # of a picture's area: less is noise
MUCH_INK = 0.01  # of a cut edge: less is a speck
THUMBNAIL = 256  # pixels a side, at most
MOST_FACES = 500  # that are shown all; of more only those with warnings, and as many as EXTREMES
EXTREMES = 50  # of the heaviest, and of the lightest
MOST_BYTES = 20 * 10**6
MOST_TEXT = 20_000  # characters of a face's captions
TEMPLATE = Path(__file__).with_suffix(".html")
MEASURED = Path(__file__).resolve().parent.parent / "bench" / "results"


# What may go wrong ---------------------------------------------------------------------------------------------


def dataset_warnings(dataset: MangaFaceDataset, config, steps: int) -> list[tuple[str, list[int]]]:
    """What to look at before training, as (one line, the faces it is about), whole data set first.

    steps: of the whole training.
    """
    faces = dataset.faces
    found = [(text, []) for text in _of_the_whole(dataset, config, steps)]
    is_coloured = [face.colour > MUCH_COLOUR for face in faces]
    are_ink = 2 * sum(is_coloured) <= len(faces)
    about_faces = {
        "In colour among ink drawings": is_coloured if are_ink else [],
        "Smaller than half the resolution": [4 * face.pixels < math.prod(face.shape) for face in faces],
        "Is a head cut? There is ink at a cut edge": [face.ink_cut > MUCH_INK for face in faces],
        "Panel frame cut away": [face.frame != (0, 0, *face.size) for face in faces],
    }
    for text, has_it in about_faces.items():
        if named := [index for index, true in enumerate(has_it) if true]:
            found.append((f"{text}: {some_of([faces[index].name for index in named])}", named))
    for group in dataset.alike:
        found.append((f"Nearly the same picture: {some_of([faces[index].name for index in group])}", group))
    return [*found, (f"Expected time and memory: {_expected(config, steps)}", [])]


def _of_the_whole(dataset: MangaFaceDataset, config, steps: int) -> list[str]:
    found, captions = [], {caption for face in dataset.faces for caption in face.captions}
    if len(dataset.faces) < FEW_FACES:
        found.append(f"Only {len(dataset.faces)} faces: {FEW_FACES} at least are advised")
    if 0 < len(dataset.validation) < FEWEST:
        remedy = to_hold_out_enough(len(dataset.faces))
        found.append(f"Only {len(dataset.validation)} faces held out, a score needs {FEWEST}: {remedy}")
    if steps < FEW_STEPS:
        epochs = math.ceil(ENOUGH_STEPS * config.num_train_epochs / steps)
        found.append(f"Only {steps} steps: --num_train_epochs {epochs} would make {ENOUGH_STEPS:,}")
    if len(captions) == 1 and len(dataset.faces) > 1:
        found.append(f"Captions all the same ({shown(min(captions))!r}): prompts will make no difference")
    if not config.demo and not USUAL_RATES[0] <= config.learning_rate <= USUAL_RATES[1]:
        low, high = USUAL_RATES
        found.append(f"learning_rate={config.learning_rate:g} is far from usual ({low:g} to {high:g})")
    try:
        if config.dry_run:  # which can do without a base; a run doesn't start without it
            find_configs(config.pretrained_model)
    except Unreachable as error:
        found.append(f"The base was NOT checked, and no text's length is known: {error}")
    return found


def _expected(config, steps: int) -> str:
    """From the figures of bench/results, if one was taken on this device with Stable Diffusion 1.5's shapes."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "this device"
    for file in sorted(MEASURED.glob("*.json")) if not config.demo else ():
        result = json.loads(file.read_text(encoding="utf-8"))
        row = next((row for row in result["rows"] if row["row"] == "a" and "images_per_s" in row), None)
        if row and (result["device"], result["model"], result["resolution"]) == (device, "sd15", config.resolution):
            images = steps * config.train_batch_size * config.gradient_accumulation_steps
            minutes, memory = images / row["images_per_s"] / 60, row["peak_reserved_mib"] / 1024
            return f"{minutes:.1f} minutes of training steps, {memory:.1f} GiB (as measured on {device})"
    return f"not measured on {device}"


# The page ------------------------------------------------------------------------------------------------------


def write_dataset_report(dataset: MangaFaceDataset, tokenizer, config, steps: int, output: Path) -> str:
    """Write output/dataset.html, whole or not at all, whatever else is there; returns a line that says what was done.

    tokenizer: the base's, None if it isn't on this machine; steps: of the whole training.
    """
    made = [path for path in (output, *output.parents) if not path.exists()]
    try:
        page = dataset_page(dataset, tokenizer, config, steps).encode("utf-8", "backslashreplace")
        write_atomic(output / PAGE, page)
    except OSError as error:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        return f"Dry run: nothing was written, {output / PAGE} can't be ({error.strerror or error})"
    return f"Dry run: only {output / PAGE} was written. Look at it before you train."


def dataset_page(dataset: MangaFaceDataset, tokenizer, config, steps: int) -> str:
    """The page: warnings, then the faces with the most warnings, then the others from the heaviest to the lightest."""
    warnings, faces = dataset_warnings(dataset, config, steps), dataset.faces
    weights = dict(zip(dataset.train, dataset.weights.tolist(), strict=True))
    lost = _lost(dataset, tokenizer)
    of_face: dict[int, list[str]] = {index: [] for index in range(len(faces))}
    for text, indices in warnings:
        for index in indices:
            of_face[index].append(text if text.startswith("Nearly") else text.split(":")[0])
    for index, face in enumerate(faces):
        of_face[index] += [face.remark] if face.remark else []
        of_face[index] += [f"{face.cut:.0%} of a side cut to fit"] if face.cut > MUCH_CUT else []
        if any(dataset.prefix + text in lost for text in face.captions):
            of_face[index].append("A caption is too long to be read to its end")
    by_weight = sorted(of_face, key=lambda index: -weights.get(index, 0))
    chosen = sorted(by_weight, key=lambda index: -len(of_face[index]))
    if len(faces) > MOST_FACES:
        heavy = [index for index in by_weight if index in weights]
        kept = {*heavy[:EXTREMES], *heavy[-EXTREMES:]}
        warned = [index for index in chosen if of_face[index] and index not in kept]
        kept |= set(warned[: MOST_FACES - len(kept)])
        chosen = [index for index in chosen if index in kept]
    with ThreadPoolExecutor(max(1, config.num_workers)) as pool:
        drawn = pool.map(lambda index: _picture(dataset, index), chosen)
        pictures = list(tqdm(drawn, f"Drawing {PAGE}", len(chosen), leave=False, disable=None, unit="face"))
    cards, room = [], MOST_BYTES - 10**6  # for the rest of the page
    for index, picture in zip(chosen, pictures, strict=True):
        card = _card(dataset, index, picture, weights.get(index), of_face[index], lost)
        room -= len(card.encode("utf-8", "backslashreplace"))
        if room < 0:
            break
        cards.append(card)
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(_top(dataset, warnings, steps, len(cards)), cards="".join(cards))


def _top(dataset: MangaFaceDataset, warnings: list[tuple[str, list[int]]], steps: int, cards: int) -> dict:
    """What stands above the faces, for the template."""
    faces = len(dataset.faces)
    about = f"{faces} faces: {len(dataset.train)} to train on, {len(dataset.validation)} held out. {steps:,} steps."
    about += f" Weights {dataset.weights.min():.2f} to {dataset.weights.max():.2f}: effective sample size "
    about += f"{dataset.effective_sample_size:.1f} of {len(dataset)}."
    if cards < faces:
        about += f" Shown are {cards}: faces with warnings, the heaviest and the lightest."
    lines = "".join(f"<li>{escape(text)}</li>\n" for text, _ in warnings[:100])
    skipped = "".join(f"<li>{escape(line[:300])}</li>\n" for line in dataset.skipped[:200])
    if skipped:
        skipped = f"<details><summary>Skipped: {len(dataset.skipped)}</summary><ul>{skipped}</ul></details>\n"
    layout = f"{escape(shown(dataset.dataset_dir.resolve().name))}: {escape(dataset.layout.title)}"
    return {"about": escape(about), "layout": layout, "warnings": lines, "skipped": skipped}


def _card(dataset: MangaFaceDataset, index: int, picture: str, weight, warnings: list[str], lost: dict) -> str:
    """One face: picture, warnings, shape and what was cut, weight and its reasons, captions."""
    face = dataset.faces[index]
    (height, width), name = face.shape, escape(shown(face.name))
    pixels = f"{width} x {height}, of {face.size[0]} x {face.size[1]}"
    cuts = {"frame": _cut((0, 0, *face.size), face.frame), "to fit": _cut(face.frame, face.box)}
    pixels += "".join(f"; cut {why}: {cut}" for why, cut in cuts.items() if cut) or "; nothing cut"
    terms = []
    if weight is None:
        weighed = "held out: validates, isn't trained on"
    else:
        terms = sorted(dataset.terms[dataset.train.index(index)], key=lambda term: -term[1])
        weighed = f"weight {weight:.2f}" + (f" for {', '.join(term for term, _ in terms)}" if terms else "")
    unread = sum(len(text) - lost.get(text, len(text)) for text in map(dataset.prefix.__add__, face.captions))
    notes = "".join(f'<p class="alert">{escape(text)}</p>\n' for text in warnings)
    return (
        f'<article data-weight="{weight or 0:.4f}" data-name="{name}" data-shape="{width / height:.4f}" '
        f'data-warnings="{len(warnings)}" data-terms="{escape(terms[0][0]) if terms else ""}" '
        f'data-captions="{sum(map(len, face.captions))}" data-lost="{unread}">\n{picture}<h3>{name}</h3>\n{notes}'
        f'<p>{escape(weighed)}</p>\n<p class="soft">{pixels}</p>\n{_captions(dataset, index, lost)}</article>\n'
    )


def _cut(outer: tuple[float, ...], inner: tuple[float, ...]) -> str:
    """'top 12, left 3': the pixels between two boxes."""
    sides = zip(("left", "top", "right", "bottom"), outer, inner, strict=True)
    pixels = {side: round(abs(first - second)) for side, first, second in sides}
    return ", ".join(f"{side} {count}" for side, count in pixels.items() if count)


def _lost(dataset: MangaFaceDataset, tokenizer) -> dict[str, int]:
    """Of each text that is longer than the text encoder reads: from which character on it isn't read."""
    if tokenizer is None:
        return {}
    texts = list(dict.fromkeys(dataset.prefix + caption for face in dataset.faces for caption in face.captions))
    tokens, last = tokenizer(texts, truncation=False, return_offsets_mapping=True), tokenizer.model_max_length - 1
    places = zip(texts, tokens.offset_mapping, strict=True)
    return {text: offsets[last][0] for text, offsets in places if len(offsets) > last + 1}


def _captions(dataset: MangaFaceDataset, index: int, lost: dict[str, int]) -> str:
    """A face's captions as a list, struck out where they aren't read; and the text that validation reads."""
    lines, room, captions = [], MOST_TEXT, dataset.faces[index].captions
    for caption in captions:
        text = dataset.prefix + caption
        read = lost.get(text, len(text))
        struck = f"<s>{escape(text[read:][:room])}</s>" if read < len(text) else ""
        lines.append(f"<li>{escape(text[:read][:room])}{struck}</li>\n")
        room -= len(text)
        if room <= 0:
            lines.append(f"<li>... {len(captions)} captions in all</li>\n")
            break
    first = dataset.texts[dataset.first_text[index]]
    joined = f"<details><summary>joined, for validation</summary>{escape(first[:MOST_TEXT])}</details>\n"
    return f"<ul>\n{''.join(lines)}</ul>\n" + (joined if first != dataset.prefix + captions[0] else "")


def _picture(dataset: MangaFaceDataset, index: int) -> str:
    """The face as it is trained on, made small, as an <img>; "" if it can't be read any more."""
    shape = dataset.faces[index].shape
    smaller = min(1, THUMBNAIL / max(shape))
    try:
        pixels = dataset.pixels(index, tuple(round(smaller * side) for side in shape))
    except MemoryError:
        raise
    except Exception:  # changed since it was read
        return '<p class="alert">can\'t be read any more</p>\n'
    image = Image.fromarray(((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
    kind, look = ("jpeg", "") if max(shape) > THUMBNAIL // 2 else ("png", ' class="small"')
    width, height = (round(THUMBNAIL * side / max(image.size)) for side in image.size)
    data = base64.b64encode(to_bytes(image, kind, quality=82)).decode()
    return f'<img{look} alt="" width="{width}" height="{height}" src="data:image/{kind};base64,{data}">\n'

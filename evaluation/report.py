"""Pictures instead of logs: OUTPUT/report.html, made anew after each epoch; comparison.html of several LoRAs.

One file each, which fetches nothing. Captions, prompts and names are foreign text: all of it is escaped.
"""

import base64
import dataclasses
import json
import shlex
from html import escape
from pathlib import Path
from string import Template

import numpy as np

from evaluation.curves import Metrics, chart
from evaluation.pictures import start_of, to_webp
from training.files import read_object, write_atomic
from training.folder import REPORT
from training.layouts import shown
from training.memory import sparingly

TEMPLATE = Path(__file__).with_suffix(".html")
METHOD = Path(__file__).parent.parent / "docs" / "how_it_works.md"
COMPARISON = "comparison.html"
MOST_BYTES = 20 * 10**6
FOR_TEXT = 3 * 10**6  # of them
MOST_TEXT, MOST_CELL = 2000, 200  # characters of a prompt or a name; of a setting
LARGEST = 768  # pixels a side of a picture that isn't in samples/
MOST_LOST = 3  # points by a part without evidence
IN_WORDS = {  # what full points in a part mean
    "style": "Tones and strokes of your faces",
    "set distance": "Likeness to your faces, all in all",
    "coherence": "Whole faces: nothing smeared, doubled or out of place",
    "adherence": "Prompts obeyed",
    "novelty": "No copies of training faces",
    "diversity": "Pictures that differ from each other, as faces do",
}


def write_report(output: Path, config, log, sentence: str = "", use: str = "", evaluated=None, **known) -> None:
    """Write output/report.html from what is in the folder; if that fails, for whatever reason, one line says so.

    sentence: what to think of the run, its first line. use: see use_it(). evaluated: (Evaluation, the LoRA file, its
    Score) of the exported epoch, with which pictures are then shown. known: see _report_page().
    """
    try:
        if evaluated:
            evaluation, file, score = evaluated
            known["rows"], device = evaluation.rows(score), evaluation.pipe.device
            at_strengths = lambda is_sparing: evaluation.at_strengths(file, score, is_sparing)  # noqa: E731
            known["strengths"] = sparingly(at_strengths, "drawing at other strengths", device, log)
        _write(output / REPORT, f"{config.lora_name}: report", _report_page(output, config, sentence, use, **known))
    except Exception as error:  # a page is not worth a training
        log(f"{output / REPORT} was not written ({shown(str(error) or repr(error))}); nothing else depends on it")


def _report_page(output, config, sentence, use, rows=None, strengths=None, warnings=(), history=(), summary=None):
    """The parts of a run's page, whether it is finished or not.

    rows, strengths: of contact_sheet(). warnings: lines about the data set. history: see Metrics; without it, what
    summary.json and metrics.csv have. summary: of a run about to finish; without it, summary.json.
    """
    about, best, scores = (read_object(output / name) for name in ("config.json", "best.json", "scores.json"))
    summary = read_object(output / "summary.json") if summary is None else summary
    best, scores = (best, scores) if summary else ({}, {})  # else of a former end, from which the run goes on
    metrics, album = Metrics(output, history or summary.get("validation", ())), Album()
    grid = Grid(output / "samples", start_of(config))
    losses = [loss for _, loss in metrics.validation]
    sentence = sentence or summary.get("verdict", "")
    reason = f"Exported: epoch {best['epoch']}, {best['reason']}" if best else ""
    next_up = "after the next" if metrics.epoch < config.num_train_epochs else "once its pictures are scored"
    done = f"Epoch {metrics.epoch} of {config.num_train_epochs} is done; reload this page {next_up}"
    when = f"finished, {summary['epochs_run']} of {config.num_train_epochs} epochs" if summary else "still training"
    yield f'<p class="soft">{escape(config.lora_name)}: {when}</p>\n<h1>{_text(sentence or reason or done)}</h1>\n'
    yield f"<p>{_text(reason)}</p>\n" if sentence else ""
    if len(losses) > 1:
        lowest, least = min(metrics.validation, key=lambda row: row[1])
        told = f"{losses[0]:.4f} -> {least:.4f} after epoch {lowest}: the error on faces that are never trained on"
        yield f'<p class="soft">Validation loss {escape(told)}</p>\n'
    if summary:
        score = f"Score: {summary['score_in_words']}. " if summary.get("score_in_words") else ""
        where = f"{score}Your LoRA: {summary.get('lora_safetensors')}; to use it, see below"
        yield f"<p>{_text(where)}</p>\n"
    yield _section("Before and after", _cards(album, *rows) if rows else grid.before_after(album))
    yield _section("How strong? 1 is as trained", _cards(album, *strengths) if strengths else "")
    yield _section("Epoch by epoch", grid.html(album, best.get("epoch")))

    title = "Training loss: each step, and the mean of the last epoch"
    curves = chart("Validation loss, and its standard error", {"": metrics.validation}, metrics.band)
    curves += chart(title, {"": metrics.smooth("w_loss")}, faint=metrics.points("w_loss"))
    curves += chart("Learning rate", {"": metrics.points("lr")})
    scored = [row for row in best.get("candidates", ()) if isinstance(row["score"], float)]
    intervals = [(row["epoch"], *row["interval"]) for row in scored]
    title = "Score of the candidates, and its interval of 95 %"
    curves += chart(title, {"": [(row["epoch"], row["score"]) for row in scored]}, intervals)
    yield _section("Curves", curves and f'<div class="cards">{curves}</div>\n')

    yield _score(scores, summary.get("score_in_words"))
    lines = "".join(f"<li>{_text(line)}</li>\n" for line in warnings)
    yield _section("The data set: what to look at", lines and f"<ul>\n{lines}</ul>\n")
    yield _settings(about, dataclasses.asdict(type(config)()))
    lines = (line.partition(": ") for line in use.splitlines())
    yield _section("Use it", "".join(f"<p>{_text(where)}</p>\n<pre>{_text(what)}</pre>\n" for where, _, what in lines))
    yield '<p class="soft">This page shows captions and folders of yours; what to give away is in share/.</p>\n'


def write_comparison(folder: Path, evaluation, scored: dict, runs: dict, sentence: str) -> Path:
    """Write folder/comparison.html: several LoRAs, {name: Score}; runs: {name: its training's folder or None}."""
    columns, numbers = {"base alone": evaluation.of_base} | scored, evaluation.shown()
    entries = {name: score.as_json()["score"] for name, score in columns.items()}
    known = {name: of for name, of in entries.items() if isinstance(of, dict)}  # else too few to judge
    bars = "".join(_bar(name, of["value"], of["maximum"] or 10, _interval(of)) for name, of in known.items())
    rows = [[score.features.pixels[number] for score in columns.values()] for number in numbers]
    pictures = _cards(Album(), rows, list(columns), [evaluation.jobs.prompts[number] for number in numbers])
    runs = {name: run for name, run in runs.items() if run}
    histories = {name: read_object(run / "summary.json").get("validation", ()) for name, run in runs.items()}
    metrics = {name: Metrics(run, histories[name]) for name, run in runs.items()}
    curves = chart("Validation loss", {name: of.validation for name, of in metrics.items()})
    smooth = {name: of.smooth("w_loss") for name, of in metrics.items()}
    curves += chart("Training loss, mean of the last epoch", smooth)
    abouts = {name: read_object(run / "config.json").get("constants", {}) for name, run in runs.items()}
    constants = dict.fromkeys(constant for about in abouts.values() for constant in about)
    table = [[constant, *(about.get(constant) for about in abouts.values())] for constant in constants]
    differ = [row for row in table if any(value != row[1] for value in row[1:])]
    page = [f"<h1>{_text(sentence)}</h1>\n", _section("Score", bars and f'<div class="cards">{bars}</div>\n')]
    page += [_section("The same prompts", pictures)]
    page += [_section("Curves", curves and f'<div class="cards">{curves}</div>\n')]
    page += [_section("Settings that differ", _table(["", *abouts], differ))]
    _write(folder / COMPARISON, "Comparison", page)
    return folder / COMPARISON


def _write(file: Path, title: str, body) -> None:
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(title=escape(title), body="".join(body))
    write_atomic(file, page.encode("utf-8", "backslashreplace"), flush=False)


def _text(value, most: int = MOST_TEXT) -> str:
    """Foreign text, or a setting, for the page; at most so many characters of it."""
    text = " / ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return escape(text if len(text) <= most else f"{text[:most]} ...")


def _section(title: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{content}" if content else ""


# Pictures ---------------------------------------------------------------------------------------------------------


class Album:
    """Pictures as <img>, as long as the page has room for them."""

    def __init__(self):
        self.room = MOST_BYTES - FOR_TEXT

    def add(self, picture: np.ndarray | Path, alt: str) -> str:
        """A picture (H, W, 3), uint8, or a WebP file."""
        content = picture.read_bytes() if isinstance(picture, Path) else to_webp(picture, LARGEST)
        data = base64.b64encode(content).decode()
        self.room -= len(data) + 500
        if self.room < 0:
            return '<p class="soft">no room on this page</p>'
        small = ' class="small"' if content[12:16] == b"VP8L" else ""  # without loss, as only small ones are
        return f'<img{small} alt="{_text(alt)}" src="data:image/webp;base64,{data}">'


def _cards(album: Album, rows: list[list], titles: list[str], captions: list[str]) -> str:
    """A card per caption, with a picture per title; see contact_sheet(). Pictures: see Album.add()."""
    cards = ""
    for pictures, caption in zip(rows, captions, strict=True):
        both = [(of, title) for of, title in zip(pictures, map(_text, titles), strict=True) if of is not None]
        figures = (f"<figure>{album.add(of, '')}<figcaption>{title}</figcaption></figure>" for of, title in both)
        row = f'<div class="row" style="--n:{len(titles)}">{"".join(figures)}</div>'
        cards += f'<article><p class="prompt">{_text(caption)}</p>{row}</article>\n'
    return cards and f'<div class="cards" style="--least:{150 * min(4, len(titles))}px">\n{cards}</div>\n'


class Grid:
    """The pictures in samples/. epochs: {epoch: {(prompt, which of its pictures): file}}; rows: of the newest epoch;
    start: what epoch 0 is.
    """

    def __init__(self, samples: Path, start: str):
        self.epochs: dict[int, dict] = {}
        self.start = start
        for prompts in samples.glob("epoch-*/prompts.json"):
            epoch, drawn = prompts.parent.name[6:], {}
            if not epoch.isdigit() or not prompts.parent.with_suffix(".png").is_file():  # not ours, or half drawn
                continue
            texts = read_object(prompts).get("prompts", [])
            for number, text in enumerate(texts):
                file = prompts.with_name(f"{number + 1:02d}.webp")
                if file.is_file():
                    drawn[text, texts[:number].count(text)] = file
            if drawn:
                self.epochs[int(epoch)] = drawn
        self.epochs = dict(sorted(self.epochs.items()))
        self.rows = list(self.epochs[max(self.epochs)]) if self.epochs else []

    def before_after(self, album: Album) -> str:
        """The pictures before the first epoch beside those of the newest; "" until there are both."""
        if 0 not in self.epochs or len(self.epochs) < 2:
            return ""
        first, newest, both = self.epochs[0], max(self.epochs), [row for row in self.rows if row in self.epochs[0]]
        rows = [[first[row], self.epochs[newest][row]] for row in both]
        return _cards(album, rows, [self.start, f"epoch {newest}"], [text for text, _ in both])

    def _size(self, epochs: set[int]) -> float:
        """Bytes of their pictures in the page."""
        return sum(1.4 * file.stat().st_size + 600 for epoch in epochs for file in self.epochs[epoch].values())

    def html(self, album: Album, best: int | None) -> str:
        """A strip of pictures per prompt, from the first to the last epoch; of fewer epochs, if there isn't room."""
        some, kept = list(self.epochs), {best, *list(self.epochs)[-1:]} & self.epochs.keys()
        while len(some) > 1 and self._size({*some, *kept}) > album.room:
            some = [epoch for epoch in some if epoch not in kept][::2]
        columns = sorted({*some, *kept})
        lines = ""
        for number, row in enumerate(self.rows):
            cells = ""
            for column, epoch in enumerate(columns):
                if row in self.epochs[epoch]:
                    title, is_best = f"epoch {epoch}" if epoch else self.start, " class=best" if epoch == best else ""
                    place = f'data-row="{number}" data-column="{column}" tabindex="{-(number + column > 0)}"'
                    picture = album.add(self.epochs[epoch][row], "")
                    place += f' style="grid-column:{column + 1}"'
                    cells += f"<button {place}{is_best}>{picture}<figcaption>{title}</figcaption></button>"
            lines += f'<div><p class="prompt">{_text(row[0])}</p><div class="strip">{cells}</div></div>\n'
        told = f"Arrow keys move; a click or Enter shows a picture beside the {self.start}'s at full size."
        if len(columns) < len(self.epochs):
            told += f" Shown are {len(columns)} of {len(self.epochs)} epochs; all are in samples/."
        return lines and f'<p>{told}</p>\n<div class="scroll" style="--n:{len(columns)}">{lines}</div>\n'


# Numbers and words ------------------------------------------------------------------------------------------------


def _bar(title: str, value: float, of: float, told: str, link: str = "") -> str:
    """A card with a bar as long as the value's share of what can be had; in another colour if it is below 0."""
    bar = f'<div class="bar c{int(value < 0)}"><b style="width:{min(1, abs(value) / of):.1%}"></b></div>'
    return f'<section><p>{_text(title)}</p>{bar}<p class="soft">{_text(told)} {link}</p></section>\n'


def _interval(entry: dict | str) -> str:
    """A score as scores.json has it, in words."""
    if isinstance(entry, str):  # too few to judge
        return entry
    low, high = entry["interval"]
    return f"{entry['value']:.1f} ({low:.1f} to {high:.1f}) of {entry.get('maximum', 10)}"


def _score(scores: dict, words: str | None) -> str:
    """A bar for each part that gives or costs points; below them what the docs say of each."""
    own, bars, below = scores.get("lora", {}), "", ""
    text = METHOD.read_text(encoding="utf-8") if METHOD.is_file() else ""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    meanings = {cells[0]: "; ".join(cells[2:]).replace("`", "") for cells in rows if len(cells) > 2}
    for name, entry in own.items():
        if not isinstance(entry, dict) or "points" not in entry:
            continue
        most = f"of {entry['of']}" if entry["of"] > 0 else f"at worst {entry['of']}" if entry["of"] else "no evidence"
        told = f"{name}: {entry['points']:.1f}, {most}"
        for column, title in (("base", "base"), ("held_out_faces", "real faces")):
            other = scores[column].get(name) if isinstance(scores.get(column), dict) else None
            told += f", {title} {other['points']:.1f}" if isinstance(other, dict) else ""
        anchor = f"part-{name.replace(' ', '-')}"
        link = f'<a href="#{escape(anchor)}">what it means</a>' if name in meanings else ""
        kept = entry["points"] - min(0, entry["of"])  # of what can only be lost, the bar shows what is left
        bars += _bar(IN_WORDS.get(name, name), kept, abs(entry["of"]) or MOST_LOST, told, link)
        below += f'<p id="{escape(anchor)}"><b>{_text(name)}</b>: {_text(meanings[name])}</p>\n' if link else ""
    told = f'<div class="cards">{bars}</div>\n<div class="soft">{below}</div>\n'
    return _section(f"Score: {words or _interval(own['score'])}", told) if own else ""


def _table(heads: list[str], rows: list[list]) -> str:
    lines = [[f"<td>{_text(cell, MOST_CELL)}</td>" for cell in row] for row in rows]
    lines = [[f"<th>{_text(head)}</th>" for head in heads], *lines]
    table = "".join(f"<tr>{''.join(line)}</tr>\n" for line in lines)
    return f'<div class="wide"><table>{table}</table></div>\n' if rows else "<p>none</p>\n"


def _settings(about: dict, defaults: dict) -> str:
    """What differs from the constants in train_manga_lora.py, and all; command, versions, seed."""
    constants, defaults = about.get("constants", {}), json.loads(json.dumps(defaults))  # tuples become lists
    differ = [[name, value, defaults.get(name)] for name, value in constants.items() if value != defaults.get(name)]
    every = _table(["", ""], list(map(list, constants.items())))
    every = f"<details><summary>all settings</summary>{every}</details>\n"
    versions = ", ".join(f"{name} {number}" for name, number in about.get("versions", {}).items())
    told = f"seed {constants.get('seed')}; device {about.get('device')}, precision {about.get('precision')}; {versions}"
    command = f"<pre>{_text(shlex.join(about['command']))}</pre>\n" if about.get("command") else ""
    made = _section("How it was made", f'{command}<p class="soft">{_text(told)}</p>\n')
    return _section("Settings that differ from the defaults", _table(["", "here", "default"], differ) + every) + made

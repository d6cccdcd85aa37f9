"""Several LoRAs beside each other: one table, one sheet; for the page see report.py."""

import json
from pathlib import Path

from evaluation import pictures
from evaluation.score import COSTS, POINTS, TOO_FEW, Evaluation, Score
from training.files import write_atomic


def table(evaluation: Evaluation, scored: dict[str, Score]) -> str:
    """A row each for the base, the LoRAs by name and held-out faces: score with interval, the parts' shares."""
    held_out = evaluation.judge_held_out()
    if held_out is None:
        copies = (f"{name}: copies of training faces: {len(score.copies())}" for name, score in scored.items())
        return "\n".join([TOO_FEW, *copies])
    rows = {"base alone": evaluation.of_base} | scored | {"held-out faces": held_out}
    width = max(20, *(len(name) + 2 for name in rows))
    parts = POINTS | {name: -of for name, of in COSTS.items()}
    title = f"score, of {evaluation.ends.maximum}"
    lines = [f"{'':{width}}{title:24}" + "".join(f"{f'{name}, {of}':>18}" for name, of in parts.items())]
    for name, score in rows.items():
        cells = "".join(f"{score.cell(part).split(' ')[0]:>18}" for part in parts)
        lines.append(f"{name:{width}}{score.cell('score'):24}{cells}")
    return "\n".join([*lines, ranking(scored)])


def ranking(scored: dict[str, Score]) -> str:
    """Which has the highest score, and whether by more than chance."""
    if any(score.score is None for score in scored.values()):
        return TOO_FEW
    best = max(scored, key=lambda name: scored[name].score)
    beaten = {name: scored[best].beats(score) for name, score in scored.items() if name != best}
    found = []
    for verb, which in (("beats", True), ("doesn't beat", False)):
        if names := ", ".join(name for name in beaten if beaten[name] is which):
            found.append(f"{verb} {names} by more than chance")
    return f"{best} has the highest score, and {'; '.join(found)}"


def short_names(names: list[str]) -> list[str]:
    """The last part of each path, for a column's head; more of it where these don't tell them apart."""
    last = [Path(name).name for name in names]
    return [name[-24:] for name in (last if len(set(last)) == len(last) else names)]


def write(folder: Path, evaluation: Evaluation, scored: dict[str, Score]) -> None:
    """Write before_after.png, a column for the base and each LoRA, and scores.json into `folder`."""
    columns = {"base alone": evaluation.of_base} | scored
    shown = evaluation.shown()
    rows = [[score.features.pixels[number] for score in columns.values()] for number in shown]
    sheet = pictures.contact_sheet(
        rows, short_names(list(columns)), [evaluation.jobs.prompts[number] for number in shown]
    )
    pictures.write_picture(folder / "before_after.png", sheet)
    scores = {name: score.as_json() for name, score in columns.items()} | {"pictures": len(evaluation.jobs.prompts)}
    write_atomic(folder / "scores.json", json.dumps(scores, indent=1, ensure_ascii=False).encode())

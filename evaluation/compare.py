"""Several LoRAs beside each other: one table, one sheet; for the page see report.py."""

import json
from pathlib import Path

from evaluation import pictures
from evaluation.score import POINTS, Evaluation, Score
from training.files import write_atomic


def table(evaluation: Evaluation, scored: dict[str, Score]) -> str:
    """A row each for the base, the LoRAs by name and held-out faces: score with interval, the parts' shares."""
    held_out = evaluation.judge_held_out()
    rows = {"base alone": evaluation.of_base} | scored | ({"held-out faces": held_out} if held_out else {})
    width = max(20, *(len(name) + 2 for name in rows))
    heads = [f"{name}, x {of}" for name, of in POINTS.items()]
    lines = [f"{'':{width}}{'quality score, 0 to 10':24}" + "".join(f"{head:>19}" for head in heads)]
    for name, score in rows.items():
        shares = (score.cell(f"points: {part}").split(" ")[0] for part in POINTS)
        cells = "".join(f"{share:>19}" for share in shares)
        lines.append(f"{name:{width}}{score.cell('points: score'):24}{cells}")
    return "\n".join([*lines, ranking(scored)])


def ranking(scored: dict[str, Score]) -> str:
    """Which has the highest score, and whether by more than chance."""
    best = max(scored, key=lambda name: scored[name].score)
    beaten = {name: scored[best].beats(score) for name, score in scored.items() if name != best}
    found = []
    for verb, which in (("beats", True), ("doesn't beat", False)):
        if names := ", ".join(name for name in beaten if beaten[name] is which):
            found.append(f"{verb} {names} by more than chance")
    return f"{best} has the highest score, and {'; '.join(found)}"


def write(folder: Path, evaluation: Evaluation, scored: dict[str, Score]) -> None:
    """Write before_after.png, a column for the base and each LoRA, and scores.json into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = {"base alone": evaluation.of_base} | scored
    shown = evaluation.shown()
    rows = [[score.features.pixels[number] for score in columns.values()] for number in shown]
    names = [name if len(name) <= 24 else f"...{name[-22:]}" for name in columns]
    sheet = pictures.contact_sheet(rows, names, [evaluation.texts[number] for number in shown])
    pictures.write_picture(folder / "before_after.png", sheet)
    scores = {name: score.as_json() for name, score in columns.items()} | {"pictures": len(evaluation.texts)}
    write_atomic(folder / "scores.json", json.dumps(scores, indent=1, ensure_ascii=False).encode())

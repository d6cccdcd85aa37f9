"""Whole trainings on the demo's base, each with something wrong on purpose: each gets its sentence. Minutes each."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, SHIPPED_JUDGE, write_faces

import train_manga_lora as trainer
from evaluation import judge

pytestmark = pytest.mark.long
FACES, OTHERS = ROOT / "demo" / "faces", ROOT / "demo" / "other_faces"


def faces_of(folder: Path, counts: dict[Path, int], caption: str | None = None) -> Path:
    """A data set of the first so many faces of each folder, all with this caption, if one is given."""
    folder.mkdir()
    entries = []
    for source, count in counts.items():
        (listed,) = source.glob("*.json")
        for entry in json.loads(listed.read_text(encoding="utf-8"))[:count]:
            (picture,) = source.glob(f"{entry['image_name']}.*")
            name = f"{source.name}_{picture.name}"
            shutil.copy(picture, folder / name)
            entries.append({"image_name": name, "captions": [caption] if caption else entry["captions"]})
    (folder / "modified_face_250.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder


RUNS = {
    "a rate 40 times too low": ({}, {"learning_rate": 1e-4}, ": raise learning_rate (0.0001) or num_train_epochs (4)."),
    "a rate 15 times too high": ({}, {"learning_rate": 6e-2}, "lower learning_rate (0.06)"),
    "12 faces": ({FACES: 12}, {"num_train_epochs": 40}, "Too few faces to judge: 4 held out, 8 are needed: add faces."),
    "equal captions": ({FACES: 250}, {}, "All captions are the same, so prompts make no difference."),
    "two styles": ({FACES: 90, OTHERS: 60}, {}, "The faces are of two styles"),
    "a good run": ("coloured", {"num_train_epochs": 12, "validation_share": 0.17}, "Style learnt"),
}


@pytest.mark.parametrize("name", RUNS)
def test_each_run_gets_its_sentence(name, tmp_path, monkeypatch):
    counts, changes, expected = RUNS[name]
    for constant, value in SHIPPED_JUDGE.items():
        monkeypatch.setattr(judge, constant, value)
    folder = FACES
    if counts == "coloured":
        folder = write_faces(counts, tmp_path / "faces")
    elif counts:
        folder = faces_of(tmp_path / "faces", counts, "a manga face" if name == "equal captions" else None)
    words = ["--demo", "--dataset_dir", str(folder), "--json_file", str(folder / "modified_face_250.json")]
    words += ["--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache")]
    changes = {"num_train_epochs": 4, "sample_every_n_epochs": 0, "early_stopping_patience": 0} | changes
    words += [word for key, value in changes.items() for word in (f"--{key}", str(value))]
    summary = trainer.main(trainer.parse_arguments(words))
    assert expected in summary["verdict"], summary["verdict"]

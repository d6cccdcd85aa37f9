"""The header of a LoRA file, held to the published rules of the programs that read it."""

import base64
import dataclasses
import datetime
import hashlib
import io
import json
import pathlib
import re
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from conftest import ROOT, exported, run, signal_at_step, small_config
from PIL import Image
from safetensors import safe_open

import train_manga_lora as trainer
from lora_layers import with_metadata
from training import labels

PICTURES = {"sample_prompts": ("a manga face",), "sample_steps": 1, "samples_per_prompt": 1, "num_train_epochs": 1}
FILE = "pytorch_lora_weights.safetensors"


def header_of(file) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_base, shared_faces):
    """(config, header) of one whole run with a trigger word, pictures included."""
    folder = tmp_path_factory.mktemp("labels")
    own = {"lora_name": "my_style", "trigger_word": "sks style"}
    config = small_config(folder, shared_faces, tiny_base, **own, **PICTURES)
    trainer.main(config)
    return config, header_of(pathlib.Path(config.output_dir, FILE))


def parts_of(content: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


# The programs' rules: each is what that program does with the file, in its own words -----------------------------


def test_modelspec_has_all_that_the_specification_asks_for(finished):
    _, header = finished
    own = {key.removeprefix("modelspec."): value for key, value in header.items() if key.startswith("modelspec.")}
    for must in ("sai_model_spec", "architecture", "implementation", "title", "resolution"):
        assert own[must], must
    assert re.fullmatch(r"1\.\d+\.\d+", own["sai_model_spec"])
    assert own["architecture"].endswith("/lora") and own["title"] == "my_style"
    assert datetime.datetime.fromisoformat(own["date"]).timestamp() == 1767225600
    assert own["prediction_type"] in ("epsilon", "v") and own["trigger_phrase"] == "sks style"
    assert re.fullmatch("0x[0-9a-f]{64}", own["hash_sha256"]) and own["encoder_layer"] == "1"
    assert "sks style" in own["description"] and own["tags"].split(",")[0] == "manga"
    assert re.fullmatch("[a-z0-9.-]+", own["license"])


def test_swarmui_can_parse_resolution_and_thumbnail(finished):
    _, header = finished
    assert [int(side) for side in header["modelspec.resolution"].split("x")] == [64, 64]
    assert header["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")
    picture = Image.open(io.BytesIO(base64.b64decode(header["modelspec.thumbnail"].split(",")[1])))
    assert picture.format == "JPEG" and max(picture.size) <= 256


def test_a1111_finds_hashes_dates_dirs_and_buckets_as_it_reads_them(finished):
    config, header = finished
    content = pathlib.Path(config.output_dir, FILE).read_bytes()
    payload = parts_of(content)[1]
    assert header["sshs_model_hash"] == hashlib.sha256(payload).hexdigest() == header["modelspec.hash_sha256"][2:]
    assert header["sshs_legacy_hash"] == hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    parsed = {key: json.loads(value) if value[:1] == "{" else value for key, value in header.items()}
    assert datetime.datetime.fromtimestamp(float(parsed["ss_training_started_at"]), datetime.UTC).year == 2026
    assert sum(int(params["img_count"]) for params in parsed["ss_dataset_dirs"].values()) == 16
    buckets = parsed["ss_bucket_info"]["buckets"].values()
    assert [(bucket["resolution"], int(bucket["count"])) for bucket in buckets] == [([64, 64], 16)]
    buckets = json.loads(of_base(config, {}, shape=(128, 64))["ss_bucket_info"])["buckets"]
    assert buckets["1"] == {"resolution": [64, 128], "count": 1}  # width first, as kohya has it
    assert (header["ss_v2"], header["ss_clip_skip"]) == ("False", "1")
    assert "ss_output_name" not in header  # as its file is called: one name in two files makes A1111 find neither


def test_the_hashes_are_those_of_a_file_that_reaches_beyond_1_mib():
    tensors = {"a": torch.arange(2**20, dtype=torch.float32)}
    content = with_metadata(safetensors.torch.save(tensors), {"b": 1, "a": None})
    header, payload = parts_of(content)
    found = header["__metadata__"]
    assert list(found) == ["b", "modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash"]
    assert found["sshs_legacy_hash"] == hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8] != "e3b0c442"
    again = with_metadata(content, {"c": "\udcff 漫画"})  # changes the header's length, hence the old hash
    assert parts_of(again)[0]["__metadata__"]["sshs_legacy_hash"] != found["sshs_legacy_hash"]
    assert parts_of(again)[1] == payload and torch.equal(safetensors.torch.load(again)["a"], tensors["a"])
    assert parts_of(again)[0]["__metadata__"]["c"] == "? 漫画"


def test_only_a_base_of_sd15_s_shapes_is_called_so_and_has_its_licence(finished, sd15_unet):
    config, header = finished
    assert header["modelspec.architecture"] == "unet-8-16-16-16-text-16/lora" and header["modelspec.license"] == "other"
    assert header["ss_base_model_version"] != "sd_v1" and "no SD 1.5" in header["modelspec.description"]
    assert of_base(config, sd15_unet.config)["modelspec.architecture"] == "stable-diffusion-v1/lora"  # Forge: SD1
    assert of_base(config, sd15_unet.config)["ss_base_model_version"] == "sd_v1"
    assert of_base(config, sd15_unet.config)["modelspec.license"] == "creativeml-openrail-m"
    for name, value in (
        ("cross_attention_dim", 1024),
        ("block_out_channels", (320, 640, 1280)),
        ("layers_per_block", 1),
    ):
        assert "unet-" in of_base(config, sd15_unet.config | {name: value})["modelspec.architecture"], name
    demo = dataclasses.replace(config, pretrained_model=str(ROOT / "demo" / "base"))
    assert of_base(demo, {"block_out_channels": (32, 64)})["modelspec.license"] == "cc-by-4.0"


def of_base(config, unet: dict, prediction_type: str = "epsilon", shape=(64, 64), **changes) -> dict:
    """labels_of() for a UNet of this config. shape: height and width of the first training face."""
    from diffusers.configuration_utils import FrozenDict

    dataset = trainer.MangaFaceDataset.from_config(config)
    dataset.faces[dataset.train[0]] = dataclasses.replace(dataset.faces[dataset.train[0]], shape=shape)
    shapes = {"block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2, "cross_attention_dim": 768}
    part = lambda **values: type("Part", (), {"config": FrozenDict(values)})  # noqa: E731
    model = type("Model", (), {"unet": part(**shapes | unet), "scheduler": part(prediction_type=prediction_type)})
    base = pathlib.Path(config.pretrained_model)
    return labels.labels_of(dataclasses.replace(config, **changes), dataset, model, base, "bf16", 1)


def test_precision_and_prediction_type_are_those_used(finished):
    config, header = finished
    assert header["ss_mixed_precision"] == "no" != config.mixed_precision  # no GPU here
    assert of_base(config, {})["ss_mixed_precision"] == "bf16"
    assert of_base(config, {}, "v_prediction")["modelspec.prediction_type"] == "v"
    assert header["modelspec.prediction_type"] == "epsilon"


def test_the_base_s_hash_is_a1111_s_short_one_of_its_file(tmp_path, finished):
    config, header = finished
    unet = pathlib.Path(config.pretrained_model, "unet", "diffusion_pytorch_model.safetensors").read_bytes()
    assert header["ss_sd_model_hash"] == hashlib.sha256(unet[0x100000:0x110000]).hexdigest()[:8]
    file = tmp_path / "anime.safetensors"
    file.write_bytes(bytes(range(256)) * 5000)
    single = dataclasses.replace(config, pretrained_model=str(file))
    assert labels.base_hash(single, tmp_path) == hashlib.sha256(file.read_bytes()[0x100000:0x110000]).hexdigest()[:8]
    assert labels.base_name(single) == "anime.safetensors"


# Privacy ---------------------------------------------------------------------------------------------------------

TAGGED = [f"1girl, smile, hat_{number % 2}, a girl who stands in the rain alone, {number}_eyes" for number in range(20)]


def tagged(faces, captions):
    entries = json.loads((faces / "modified_face_250.json").read_text())
    for entry, caption in zip(entries, captions, strict=True):
        entry["captions"] = [caption]
    (faces / "modified_face_250.json").write_text(json.dumps(entries))


def test_tags_are_counted_for_a1111_and_nothing_longer_is_written(tiny_config, faces):
    tagged(faces, [*TAGGED[:17], *3 * ["It rains, alone. She, who?"]])
    frequency = json.loads(of_base(tiny_config, {})["ss_tag_frequency"])
    dataset = trainer.MangaFaceDataset.from_config(tiny_config)
    expected = [tag for face in dataset.train for text in dataset.faces[face].captions for tag in text.split(", ")]
    assert list(frequency) == ["faces"] and "1girl" in expected
    for tag, count in frequency["faces"].items():
        assert count == expected.count(tag), tag
    assert "hat 1" in frequency["faces"] and not any(
        word in tag for word in ("rain", "She", "alone.") for tag in frequency["faces"]
    )
    counts = list(frequency["faces"].values())
    assert counts == sorted(counts, reverse=True)
    with_word = of_base(tiny_config, {}, trigger_word="sks")
    assert json.loads(with_word["ss_tag_frequency"])["faces"]["sks"] == len(dataset)
    assert of_base(tiny_config, {}, private_captions=True, trigger_word="sks")["ss_tag_frequency"] is None


def test_what_a_sentence_among_tags_says_of_one_face_is_not_written(tiny_config, faces):
    sentences = [
        "Photo of my sister Anna, who lives in Berlin, at 12 Foo Street",  # no full stop, long parts
        "Anna and her big dog, playing in the old garden",  # too few parts
        "my best friend Maria Huber, smile, long hair",  # reads as tags, but for one part
    ]
    tagged(faces, [*TAGGED[:17], *sentences])
    share = dataclasses.replace(tiny_config, validation_share=0)
    frequency = json.loads(of_base(share, {})["ss_tag_frequency"])["faces"]
    assert "smile" in frequency and "hat 1" in frequency
    assert not any(word in tag for tag in frequency for word in ("Anna", "Berlin", "Foo", "Maria", "garden"))


def test_no_sentence_and_no_path_is_in_any_file_to_be_given_away(finished):
    config, header = finished
    text = " ".join(header.values())
    entries = json.loads(pathlib.Path(config.json_file).read_text())
    assert not [caption for entry in entries for caption in entry["captions"] if caption in text]
    assert json.loads(header["ss_tag_frequency"]) == {"faces": {"sks style": 16}}  # of sentences: the trigger alone
    for path in (config.dataset_dir, config.output_dir, config.pretrained_model, str(pathlib.Path.home())):
        assert path not in text


def test_private_captions_and_another_name_export_a_finished_run_anew(tiny_config, faces):
    tagged(faces, TAGGED)
    run(tiny_config, num_train_epochs=1)
    file, before = pathlib.Path(tiny_config.output_dir, FILE), exported(tiny_config)
    assert "ss_tag_frequency" in header_of(file)
    run(tiny_config, num_train_epochs=1, private_captions=True, lora_name="other")
    assert "ss_tag_frequency" not in header_of(file) and header_of(file)["modelspec.title"] == "other"
    assert exported(tiny_config) == before
    assert sorted(path.name for path in file.parent.glob("share/*.safetensors")) == ["other.safetensors", FILE]


# Equal runs ------------------------------------------------------------------------------------------------------


def test_equal_runs_killed_or_not_give_equal_files_header_and_all(tiny_config, monkeypatch):
    first = dataclasses.replace(tiny_config, **PICTURES | {"num_train_epochs": 2, "train_batch_size": 1})
    second = dataclasses.replace(first, output_dir=first.output_dir + "-again")
    run(first)
    with monkeypatch.context() as patch, pytest.raises(trainer.Stop):
        signal_at_step(patch, 3)
        run(second)
    run(second)
    for name in (FILE, f"last/{FILE}", "share/manga_faces.safetensors", "pytorch_lora_weights.bin", "share/README.md"):
        assert exported(first, name) == exported(second, name), name


def test_the_date_is_the_run_s_start_and_outlives_an_interruption(tiny_config, monkeypatch):
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    with monkeypatch.context() as patch, pytest.raises(trainer.Stop):
        patch.setattr(labels.time, "time", lambda: 1_700_000_000.5)
        signal_at_step(patch, 3)
        run(tiny_config)
    run(tiny_config)
    header = header_of(pathlib.Path(tiny_config.output_dir, FILE))
    assert header["ss_training_started_at"] == "1700000000"
    assert header["modelspec.date"] == "2023-11-14T22:13:20+00:00"


@pytest.mark.parametrize("value", ["yesterday", "-1", "1.5", "99999999999", " ", ""])
def test_a_source_date_that_is_none_is_refused_before_training(tiny_config, monkeypatch, tmp_path, value):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", value)
    with pytest.raises(trainer.Stop, match=f"SOURCE_DATE_EPOCH='{value}' must be a whole number") as stop:
        run(tiny_config)
    assert stop.value.exit_code == 2 and not (tmp_path / "out").exists()
    if value in ("yesterday", ""):  # which numpy can't take either, as soon as it is imported
        command = [sys.executable, "train_manga_lora.py", "--demo", "--output_dir", str(tmp_path / "out")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("train_manga_lora.py: SOURCE_DATE_EPOCH=")
        done = subprocess.run(
            [sys.executable, "evaluate_lora.py", "--lora", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 2 and done.stderr.startswith("evaluate_lora.py: SOURCE_DATE_EPOCH=")


def test_the_start_that_a_checkpoint_keeps_counts_even_if_it_is_1970(monkeypatch):
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    assert labels.run_start(0) == 0 and labels.run_start() > 1.7e9


def test_the_order_of_the_header_is_the_same_in_every_process():
    code = "import sys, torch, safetensors.torch; from lora_layers import with_metadata; sys.stdout.buffer.write("
    code += "with_metadata(safetensors.torch.save({c: torch.ones(2) for c in 'cab'}), {c: c for c in 'hgfedcba'}))"
    command = [sys.executable, "-c", code]
    assert len({subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout for _ in range(3)}) == 1


# The name --------------------------------------------------------------------------------------------------------

RESERVED = ["none", "Addams", "con", "NUL", "com1", "pytorch_lora_weights", "my_PyTorch_LoRA_weights"]
WRONG = ["", "a/b", "a\\b", "..", "a b", "a:b", "a>b", "a,b", ".hidden", "-x", "x.safetensors", "a\n", "n" * 65]


@pytest.mark.parametrize("name", RESERVED + WRONG, ids=repr)
def test_a_name_that_a_program_cannot_take_is_refused_in_one_line(tiny_config, name, tmp_path):
    with pytest.raises(trainer.Stop) as stop:
        run(tiny_config, lora_name=name)
    assert stop.value.exit_code == 2 and "\n" not in str(stop.value)
    assert str(stop.value).startswith(f"lora_name={name!r} must be up to 64 letters")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["manga_faces", "Ink-2", "漫画", "console", "nonesuch", "pytorch_lora_weights_2", "n" * 64]
)
def test_other_names_are_taken(tiny_config, name):
    trainer.check_config(dataclasses.replace(tiny_config, lora_name=name))


def test_a_name_too_long_for_a_file_system_is_refused_before_training(tiny_config):
    with pytest.raises(trainer.Stop, match="must be at most 200 bytes"):
        run(tiny_config, lora_name="\N{CJK UNIFIED IDEOGRAPH-20000}" * 51)
    trainer.check_config(dataclasses.replace(tiny_config, lora_name="\N{CJK UNIFIED IDEOGRAPH-20000}" * 50))

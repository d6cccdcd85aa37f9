"""report.html and comparison.html: what they tell, that they escape it, and how they behave in a real browser.

The folders are made by hand; one run of a tiny model shows when a report is made, and that it never stops a training.

    python tests/test_report.py demo_output/report.html demo/report.png 1500    takes a picture of its upper 1500 pixels
"""

import base64
import dataclasses
import errno
import io
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import randomise, small_config
from PIL import Image
from safetensors.torch import load_file, save_file

import train_manga_lora as trainer
from dataset import MangaFaceDataset
from evaluation import report
from evaluation.curves import BOTTOM, LEFT, RIGHT, TOP, Metrics, chart
from evaluation.pictures import write_album
from evaluation.report import IN_WORDS, write_comparison, write_report
from evaluation.score import COSTS, POINTS, STRENGTHS, Evaluation
from lora_layers import inject_lora, save_lora_weights
from training.base_model import load_tokenizer, load_unet
from training.folder import METRICS

NASTY = """<script>alert("x")</script> & <img src='https://example.org/x.png' onerror=alert(1)> "'></p>"""
LOSSES = [0.08, 0.06, 0.05, 0.055]  # of validation, the base's first
INSTALL = "a browser is missing: apt-get install chromium chromium-driver; pip install selenium"


def picture(number: int, side: int = 64) -> np.ndarray:
    """Grey, another shade for each number, with a dark square."""
    pixels = np.full((side, side, 3), 90 + number * 13 % 160, np.uint8)
    pixels[side // 4 : side // 2, side // 4 : side // 2] = 20
    return pixels


def write_samples(folder: Path, epoch: int, prompts: list[str]) -> None:
    write_album(folder / "samples" / f"epoch-{epoch:03d}", prompts, [picture(epoch + n) for n in range(len(prompts))])
    Image.new("RGB", (8, 8)).save(folder / "samples" / f"epoch-{epoch:03d}.png")


def entry(value: float, **points) -> dict:
    return {"value": value, "interval": [value - 0.3, value + 0.3], "n": 24} | points


def make_run(folder: Path, text: str = "a face", finished: bool = True, **changes):
    """The folder of a run of 3 epochs of 4 steps, as far as a report reads it; returns its config."""
    config = trainer.TrainingConfig(output_dir=str(folder), num_train_epochs=3, trigger_word=text, **changes)
    folder.mkdir(parents=True)
    about = {"constants": dataclasses.asdict(config), "device": "cpu", "precision": "no"}
    about |= {"command": ["python", "train_manga_lora.py", text], "versions": {"torch": "2.13.0"}}
    (folder / "config.json").write_text(json.dumps(about))
    rows = [dict.fromkeys(METRICS, 0) | {"epoch": n // 4 + 1, "step": n + 1, "val_loss": ""} for n in range(12)]
    for number, row in enumerate(rows):
        row |= {"w_loss": "nan" if number == 5 else 0.1 / (number + 1), "lr": 5e-5 * (12 - number) / 12}
        if number % 4 == 3:
            row["val_loss"] = LOSSES[1 + number // 4]
    lines = [",".join(METRICS), *(",".join(str(row[name]) for name in METRICS) for row in rows)]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    for epoch in range(4):
        write_samples(folder, epoch, [f"{text} {number}" for number in range(3)])
    if finished:
        candidates = [{"epoch": 2, "score": 5.5, "interval": [5.0, 6.0]}, {"epoch": 3, "score": "n/a"}]
        best = {"epoch": 2, "reason": f"the best of {text}", "candidates": candidates}
        (folder / "best.json").write_text(json.dumps(best))
        lora = {
            "score": entry(6.1, maximum=10),
            "style": entry(0.4, points=1.5, of=3),
            f"new {text}": entry(1, points=-0.5, of=-3),
        }
        scores = {"base": {"style": entry(0.9, points=0.2, of=3)}, "lora": lora, "held_out_faces": "n/a"}
        (folder / "scores.json").write_text(json.dumps(scores))
        history = [[epoch, loss, 0.004] for epoch, loss in enumerate(LOSSES)]
        made = {"score_in_words": "6.1 (5.8 to 6.4) of 10", "lora_safetensors": str(folder / f"{text}.safetensors")}
        (folder / "summary.json").write_text(json.dumps({"epochs_run": 3, "validation": history} | made))
    return config


def fake_evaluation(text: str = "a face"):
    """(what a report asks of it, a file, a Score)."""

    def rows(score):
        shown = [[picture(n) for n in range(4)], [None, *(picture(n) for n in range(3))]]  # a prompt has no real face
        return shown, ["real face", "base", "LoRA", "nearest training face"], [f"{text} shown", f"{text} shown too"]

    def at_strengths(file, score, is_sparing):
        return [[picture(number) for number in range(5)]], list(map(str, STRENGTHS)), [f"{text} sweep"]

    pipe = SimpleNamespace(device=torch.device("cpu"))
    return SimpleNamespace(rows=rows, at_strengths=at_strengths, pipe=pipe), Path("lora.safetensors"), None


def written(folder: Path, config, **known) -> str:
    told = []
    write_report(folder, config, told.append, **known)
    assert told == []
    return (folder / "report.html").read_text(encoding="utf-8")


class Tags(HTMLParser):
    """All tags with their attributes, and the text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


# What it tells ------------------------------------------------------------------------------------------------------


def test_a_report_tells_all_of_a_finished_run_and_the_sentence_first(tmp_path):
    config = make_run(tmp_path / "out")
    known = {"use": "In Python: pipe(...)\nCopy: a to b", "warnings": ["Only 12 steps"], "evaluated": fake_evaluation()}
    page = written(tmp_path / "out", config, sentence="Style learnt, faces intact", **known)
    text = Tags(page).text
    parts = [
        "Style learnt, faces intact",
        "Exported: epoch 2, the best of a face",
        "0.0800 -> 0.0500 after epoch 2",
        "Score: 6.1 (5.8 to 6.4) of 10. Your LoRA: ",
        "a face.safetensors; to use it, see below",
        "Before and after",
    ]
    parts += [
        "a face shown",
        "nearest training face",
        "How strong?",
        "a face sweep",
        *map(str, STRENGTHS),
        "Epoch by epoch",
    ]
    parts += ["a face 0", "base", "epoch 1", "epoch 3", "Curves", "Validation loss", "Training loss", "Learning rate"]
    parts += [
        "Score of the candidates",
        "Score: 6.1 (5.8 to 6.4) of 10",
        IN_WORDS["style"],
        "style: 1.5, of 3, base 0.2",
    ]
    parts += [
        "what it means",
        "new a face: -0.5, at worst -3",
        "The data set",
        "Only 12 steps",
        "num_train_epochs",
        "all settings",
    ]
    parts += [
        "python train_manga_lora.py 'a face'",
        "seed 0",
        "torch 2.13.0",
        "Use it",
        "In Python",
        "pipe(...)",
        "a to b",
    ]
    for part in parts:  # in this order
        assert part in text, part
        text = text[text.index(part) :]
    assert page.index("<h1>Style learnt") < page.index("<img")
    widths = re.findall(r'<div class="bar c(\d)"><b style="width:([\d.]+)%', page)
    assert widths == [("0", "50.0"), ("0", "83.3")]  # 1.5 of 3; 2.5 left of 3 that can only be lost


def test_without_a_verdict_the_best_epoch_s_reason_is_the_sentence(tmp_path):
    config = make_run(tmp_path / "out")
    assert "<h1>Exported: epoch 2, the best of a face</h1>" in written(tmp_path / "out", config)


def test_a_report_of_an_unfinished_run_compares_base_and_newest_epoch(tmp_path):
    config = make_run(tmp_path / "out", finished=False)
    page = written(tmp_path / "out", config)
    assert "<h1>Epoch 3 of 3 is done; reload this page" in page and "still training" in page
    before_after = page.split("<h2>Before and after</h2>")[1].split("<h2>")[0]
    assert before_after.count("<figcaption>base</figcaption>") == before_after.count("<figcaption>epoch 3<") == 3
    assert "Score" not in Tags(page).text and Metrics(tmp_path / "out").validation[0] == (1, 0.06)


def test_a_report_of_nothing_but_settings_is_one_too(tmp_path):
    config = make_run(tmp_path / "out", finished=False)
    shutil.rmtree(tmp_path / "out" / "samples")
    (tmp_path / "out" / "metrics.csv").unlink()
    assert "Epoch 0 of 3 is done" in written(tmp_path / "out", config)


def test_damaged_pictures_cost_their_place_on_the_page_and_no_more(tmp_path):
    config = make_run(tmp_path / "out")
    samples = tmp_path / "out" / "samples"
    (samples / "epoch-001" / "02.webp").unlink()
    (samples / "epoch-002" / "prompts.json").write_text("[")
    page = written(tmp_path / "out", config)
    assert page.count("<figcaption>epoch 1</figcaption></button>") == 2 and "epoch 2</figcaption></button>" not in page


def test_pictures_are_embedded_as_they_were_drawn(tmp_path):
    config = make_run(tmp_path / "out")
    page = written(tmp_path / "out", config)
    sources = [attributes["src"] for tag, attributes in Tags(page).tags if tag == "img"]
    assert len(sources) == 3 * 2 + 3 * 4 and all(source.startswith("data:image/webp;base64,") for source in sources)
    found = np.array(Image.open(io.BytesIO(base64.b64decode(sources[-1].split(",")[1]))).convert("RGB"))
    assert np.array_equal(found, picture(3 + 2))  # epoch 3, the third prompt; small ones lose nothing


def test_parts_of_the_score_have_plain_words_and_a_meaning_in_the_docs(tmp_path):
    text = report.METHOD.read_text(encoding="utf-8").split("## The quality score")[1]
    for part in POINTS | COSTS:
        assert part in IN_WORDS and f"\n| {part} | " in text, part


# Foreign text -------------------------------------------------------------------------------------------------------


def test_captions_prompts_names_and_settings_are_escaped_everywhere(tmp_path):
    config = make_run(tmp_path / "out", NASTY, lora_name=NASTY)
    known = {"use": f"{NASTY}: {NASTY}", "warnings": [NASTY], "evaluated": fake_evaluation(NASTY)}
    page = written(tmp_path / "out", config, sentence=NASTY, **known)
    other = make_run(tmp_path / "other", NASTY + "2")
    assert other.trigger_word != config.trigger_word
    names = {f"{NASTY}a": tmp_path / "out", f"{NASTY}b": tmp_path / "other"}
    comparison = write_comparison(tmp_path, *fake_comparison(names, NASTY), names, NASTY).read_text(encoding="utf-8")
    for content in (page, comparison):
        tags = Tags(content).tags
        assert [tag for tag, _ in tags].count("script") == 1 and "<script>alert" not in content
        assert {name for _, attributes in tags for name in attributes if name.startswith("on")} == set()
        for tag, attributes in tags:
            assert attributes.get("src", "data:").startswith("data:"), (tag, attributes)
            assert attributes.get("href", "#").startswith("#")
        assert content.count("https://example.org") == Tags(content).text.count("https://example.org") > 3


def test_half_a_surrogate_and_a_long_text_are_no_obstacle(tmp_path):
    config = make_run(tmp_path / "out")
    page = written(tmp_path / "out", config, sentence="\ud800 face", warnings=["x" * 10**6])
    assert "\\ud800 face" in page and len(page) < 10**6


# Size ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompts", "epochs"), [(4, 100), (200, 3)])
def test_a_report_has_at_most_20_mb_whatever_was_drawn(tmp_path, prompts, epochs):
    config = make_run(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "samples")
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    write_album(tmp_path / "one", ["a"], [noise])
    for epoch in range(epochs):
        write_samples(tmp_path / "out", epoch, [])
        folder = tmp_path / "out" / "samples" / f"epoch-{epoch:03d}"
        (folder / "prompts.json").write_text(json.dumps({"prompts": [f"prompt {number}" for number in range(prompts)]}))
        for number in range(prompts):
            (folder / f"{number + 1:02d}.webp").hardlink_to(tmp_path / "one" / "01.webp")
    page = written(tmp_path / "out", config)
    assert 5 * 10**6 < len(page.encode()) <= 20 * 10**6
    if prompts == 4:
        columns = [int(epoch) for epoch in re.findall(r"<figcaption>epoch (\d+)</figcaption></button>", page)][:-1]
        assert {2, 99} <= set(columns) and "<figcaption>base</figcaption></button>" in page
        assert f"Shown are {len(set(columns)) + 1} of 100 epochs" in page and "no room" not in page
    else:
        assert "no room on this page" in page


# Curves -------------------------------------------------------------------------------------------------------------


def test_a_curve_s_points_are_where_its_numbers_are():
    points = [(0, 0.08), (1, 0.06), (2.5, 0.05)]
    drawing = chart("Loss", {"a": points, "b": [(3, 0.02)]}, band=[(0, 0.07, 0.09), (2.5, 0.04, 0.06)])
    paths = re.findall(r'<path class="(line|band)[^"]*" d="([^"]+)"', drawing)
    assert [kind for kind, _ in paths] == ["band", "line", "line"]
    places = [tuple(map(float, place.split())) for place in re.findall(r"[\d.]+ [\d.]+", paths[1][1])]
    labels = re.findall(rf'<text x="{LEFT - 4}" y="([\d.]+)" text-anchor="end">([\d.]+)</text>', drawing)
    (y0, v0), (y1, v1) = [(float(y) - 4, float(value)) for y, value in (labels[0], labels[-1])]
    assert len(labels) >= 2
    for (x, y), (epoch, value) in zip(places, points, strict=True):  # the labels are the reference
        assert v0 + (y - y0) * (v1 - v0) / (y1 - y0) == pytest.approx(value, abs=1e-4)
        assert x == pytest.approx(LEFT + (RIGHT - LEFT) * epoch / 3, abs=0.06) and TOP <= y <= BOTTOM
    assert chart("Loss", {"a": []}) == ""
    assert "<path" in chart("Rate", {"a": [(1, 0.0)]}) and "<path" in chart("Rate", {"a": [(1, 3e-5)] * 2})


def test_the_smoothed_loss_is_the_mean_of_the_last_epoch_of_steps(tmp_path):
    make_run(tmp_path / "out")
    metrics = Metrics(tmp_path / "out")
    raw = [0.1 / number for number in range(1, 13) if number != 6]  # which was no number
    expected = [np.mean(raw[max(0, end - 4) : end]) for end in range(1, 12)]
    assert [value for _, value in metrics.smooth("w_loss")] == pytest.approx(expected)
    assert metrics.points("w_loss")[-1] == (3, raw[-1]) and (metrics.epoch, metrics.steps_per_epoch) == (3, 4)


# Several LoRAs ------------------------------------------------------------------------------------------------------


def fake_comparison(names, text="a face"):
    """(an Evaluation, {name: Score}) of one prompt."""
    scores = [
        SimpleNamespace(
            features=SimpleNamespace(pixels=[picture(n)]), as_json=lambda n=n: {"score": entry(5.0 + n, maximum=8)}
        )
        for n in range(len(names) + 1)
    ]
    jobs = SimpleNamespace(prompts=[f"{text} shown"])
    evaluation = SimpleNamespace(of_base=scores[0], jobs=jobs, shown=lambda: [0])
    return evaluation, dict(zip(names, scores[1:], strict=True))


def test_a_comparison_shows_runs_side_by_side_and_what_differs(tmp_path):
    make_run(tmp_path / "a", learning_rate=1e-4)
    make_run(tmp_path / "b", learning_rate=2e-4)
    runs = {"a": tmp_path / "a", "b": tmp_path / "b", "theirs": None}
    file = write_comparison(tmp_path / "new", *fake_comparison(runs), runs, "b has the highest score")
    page = file.read_text(encoding="utf-8")
    assert file == tmp_path / "new" / "comparison.html"
    text = Tags(page).text
    for part in [
        "b has the highest score",
        "base alone",
        "7.0 (6.7 to 7.3) of 8",
        "theirs",
        "a face shown",
        "Validation loss",
    ]:
        assert part in text, part
        text = text[text.index(part) :]
    table = text.split("Settings that differ")[1]
    assert "learning_rate" in table and "0.0001" in table and "0.0002" in table and "lora_rank" not in table
    assert page.count("<img") == 4 and page.count('class="line c1"') >= 2  # the curves of b


def test_the_strengths_are_those_of_the_lora_s_scaled_weights(tmp_path, shared_faces, tiny_base):
    """Drawn by diffusers' adapter weights; the reference is a file whose up weights are multiplied."""
    prompts = {"sample_prompts": ("a face", "another face"), "samples_per_prompt": 1, "sample_steps": 2}
    config = small_config(tmp_path, shared_faces, tiny_base, guidance_scale=2.0, **prompts)
    dataset = MangaFaceDataset.from_config(config, 32)
    dataset.make_texts(load_tokenizer(tiny_base))
    unet, _ = load_unet(tiny_base, torch.device("cpu"), torch.float32)
    inject_lora(unet, 4, 8)
    randomise(unet, 1)
    file = tmp_path / "one" / "lora.safetensors"
    save_lora_weights(unet, file, torch.float32)
    evaluation = Evaluation(config, dataset, tiny_base, torch.device("cpu"))
    score = evaluation.judge(file)
    rows, titles, captions = evaluation.at_strengths(file, score)
    own = dataset.texts[dataset.first_text[dataset.validation[0]]]
    assert titles == ["0", "0.4", "0.7", "1", "1.3"] and captions == [own, "a face"]
    for strength in (0, 0.7, 1):
        scaled = {k: v * strength if "lora_up" in k else v for k, v in load_file(file).items()}
        other = tmp_path / f"{strength}" / "lora.safetensors"
        other.parent.mkdir()
        save_file(scaled, other)
        with evaluation.wearing(other):
            drawn = evaluation._draw([0, evaluation.jobs.samples[0]])
        for row, reference in zip(rows, drawn, strict=True):
            assert abs(row[titles.index(str(strength))].astype(int) - reference).max() <= 1
    assert all(abs(row[1].astype(int) - row[4]).max() > 1 for row in rows)


# In a run -----------------------------------------------------------------------------------------------------------


def test_a_report_is_made_at_every_epoch_s_end_and_its_failure_stops_nothing(tmp_path, faces, tiny_base, monkeypatch):
    prompts = {"sample_prompts": ("a face",), "samples_per_prompt": 1, "sample_steps": 1, "sample_every_n_epochs": 1}
    config = small_config(tmp_path, faces, tiny_base, **prompts)
    pages, original, printed = [], report.write_atomic, []

    def write(file, content, **options):
        pages.append(content.decode())
        if len(pages) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        if len(pages) == 3:
            raise ValueError("a bug\nof two lines")
        original(file, content, **options)

    monkeypatch.setattr(report, "write_atomic", write)
    monkeypatch.setattr("tqdm.tqdm.write", lambda text, *_, **__: printed.append(text))
    summary = trainer.main(config)
    assert [re.search("<h1>(.*?) is", page)[1] for page in pages[:4]] == [f"Epoch {epoch} of 3" for epoch in range(4)]
    assert "finished, 3 of 3 epochs" in pages[4] and len(pages) == 5 and summary["epochs_run"] == 3
    failed = [line for line in printed if "report.html was not written" in line]
    assert len(failed) == 2 and "No space left" in failed[0] and all(len(line.splitlines()) == 1 for line in failed)
    final = (tmp_path / "out" / "report.html").read_text()
    assert final == pages[4] and final.count("<figcaption>1.3</figcaption>") == 2
    assert "Use it" in final and "Only 6 steps" in final and 'class="band"' in final
    assert f"epoch {summary['best_epoch']}" in final and len(summary["validation"]) == 4


# In a real browser --------------------------------------------------------------------------------------------------


def start_browser():
    """Headless Chromium, driven by chromedriver; skips the test where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason=INSTALL)
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    driver = shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip(INSTALL)
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.chrome.service.Service(driver))


@pytest.fixture(scope="module")
def browser():
    chrome = start_browser()
    yield chrome
    chrome.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    config = make_run(folder / "out", NASTY)
    known = {"use": "In Python: pipe()", "warnings": [NASTY], "evaluated": fake_evaluation(NASTY)}
    written(folder / "out", config, sentence=NASTY, **known)
    make_run(folder / "other", "another", learning_rate=1e-3)
    runs = {"out": folder / "out", "other": folder / "other"}
    comparison = write_comparison(folder, *fake_comparison(runs, NASTY), runs, NASTY)
    return {"report": folder / "out" / "report.html", "comparison": comparison}


def visit(browser, page: Path, width: int = 1400, theme: str = "light") -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    for log in ("browser", "performance"):
        browser.get_log(log)  # of the page before
    browser.get(page.as_uri())


def requested(browser) -> list[str]:
    events = [json.loads(line["message"])["message"] for line in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return [url for url in asked if not url.startswith("data:")]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("name", ["report", "comparison"])
def test_a_page_opens_without_error_or_request_and_fits(browser, pages, name, width, theme):
    visit(browser, pages[name], width, theme)
    assert browser.execute_script("return document.documentElement.scrollWidth") == width  # nothing sticks out
    loaded = "return [...document.images].every(image => image.complete && image.naturalWidth > 1)"
    assert browser.execute_script(loaded)
    colours = "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
    page, text = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in browser.execute_script(colours))
    assert (page > 600 and text < 150) if theme == "light" else (page < 150 and text > 600)
    smallest = (
        "return Math.min(...[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height))"
    )
    assert browser.execute_script(smallest) > 9  # pixels: can be read on a phone
    assert browser.get_log("browser") == [] and requested(browser) == [pages[name].as_uri()]


def test_a_request_or_an_error_would_be_noticed(browser, tmp_path):
    """Negative control of the test above."""
    (tmp_path / "bad.html").write_text("<img src='other.png'><script>nothing()</script>")
    visit(browser, tmp_path / "bad.html")
    assert len(browser.get_log("browser")) == 2 and len(requested(browser)) == 2


def test_arrow_keys_move_through_the_pictures_and_enter_shows_a_pair(browser, pages):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    def press(*keys):
        for key in keys:
            browser.switch_to.active_element.send_keys(key)

    def place():
        return tuple(int(browser.switch_to.active_element.get_attribute(f"data-{name}")) for name in ("row", "column"))

    def shown():
        captions = browser.find_elements(By.CSS_SELECTOR, "dialog[open] figcaption")
        return [caption.text for caption in captions]

    visit(browser, pages["report"])
    cells = browser.find_elements(By.CSS_SELECTOR, ".strip button")
    assert len(cells) == 12 and [cell.get_attribute("tabindex") for cell in cells] == ["0"] + ["-1"] * 11
    for _ in range(20):  # by Tab alone to the grid
        browser.switch_to.active_element.send_keys(Keys.TAB)
        if browser.switch_to.active_element.tag_name == "button":
            break
    assert place() == (0, 0)
    press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    assert place() == (1, 2) and shown() == []
    press(Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.ARROW_UP, Keys.ARROW_UP)
    assert place() == (0, 0)  # the ends hold
    press(Keys.ARROW_RIGHT, Keys.ENTER)
    assert shown() == ["base", "epoch 1"]
    dialog = browser.find_element(By.CSS_SELECTOR, "dialog")
    assert dialog.find_element(By.CSS_SELECTOR, ".prompt").text == f"{NASTY} 0"
    assert dialog.find_element(By.CSS_SELECTOR, "img").size["width"] >= 300  # 64 pixels, made large
    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.ARROW_RIGHT)
    assert shown() == ["base", "epoch 2"]
    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.ESCAPE)
    assert shown() == [] and place() == (0, 2)
    cells[7].click()  # by a pointer, too
    assert shown() == ["base", "epoch 3"]
    assert browser.get_log("browser") == []


if __name__ == "__main__":
    chrome = start_browser()
    visit(chrome, Path(sys.argv[1]).resolve())
    clip = {"x": 0, "y": 0, "width": 1400, "height": int(sys.argv[3]), "scale": 1}
    shot = chrome.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    Path(sys.argv[2]).write_bytes(base64.b64decode(shot["data"]))
    chrome.quit()

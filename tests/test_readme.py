"""README.md and the other pages are held to the code. `python tests/test_readme.py` prints the table of promises."""

import dataclasses
import inspect
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
NAMES = ("README.md", "docs/how_it_works.md", "docs/results.md", "demo/README.md", "CONTRIBUTING.md", "CHANGELOG.md")
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
README, METHOD, RESULTS = (PAGES[name] for name in NAMES[:3])
every_page = pytest.mark.parametrize("page", PAGES)

LAUNCH_FLAGS = {  # of accelerate launch
    "num_processes",
    "multi_gpu",
    "cpu",
    "num_machines",
    "machine_rank",
    "main_process_ip",
    "main_process_port",
}
OWN_FLAGS = {  # of each other program: by path
    path.relative_to(ROOT).as_posix(): set(re.findall(r"add_argument\(\s*\"--([\w-]+)", path.read_text("utf-8")))
    for path in [ROOT / "evaluate_lora.py", *(ROOT / "bench").glob("*.py"), *(ROOT / "demo").glob("*.py")]
}
TAKE_ITS_CONSTANTS = ("train_manga_lora.py", "evaluate_lora.py", "bench/which_epoch.py")  # as flags
ORIGINAL_SNIPPET = """\
from diffusers import StableDiffusionPipeline
import torch

# Load base model
pipe = StableDiffusionPipeline.from_pretrained(
    "runwayml/stable-diffusion-v1-5",
    torch_dtype=torch.float16
)

# Load trained LoRA weights
pipe.load_lora_weights("lora_output/pytorch_lora_weights.bin")

# Generate manga faces
prompt = "A detailed manga face portrait of a young warrior, sharp eyes, determined expression, clean lineart, black \
and white manga style"
image = pipe(prompt, num_inference_steps=50, guidance_scale=7.5).images[0]
image.save("generated_manga_face.png")
"""


def fences(page: str, *languages: str) -> list[str]:
    """The contents of a page's fenced blocks marked with one of these languages ("" = none)."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", PAGES[page], re.MULTILINE | re.DOTALL)
    return [content for marked, content in blocks if marked in languages]


def commands(*pages: str) -> dict[str, list[str]]:
    """Every command in fenced blocks that runs something of this project: as written, and as words."""
    lines = [line for page in pages for block in fences(page, "bash", "powershell") for line in block.splitlines()]
    words = [shlex.split(line.replace("\\", "/"), comments=True) for line in lines]
    starts = ("python", ".venv/bin/python", "accelerate", "make", "bash")
    return {" ".join(line): line for line in words if line and line[0] in starts}


def trainer_flags() -> set[str]:
    from train_manga_lora import TrainingConfig

    switches = {f"no-{field.name}" for field in dataclasses.fields(TrainingConfig) if field.type is bool}
    return {field.name for field in dataclasses.fields(TrainingConfig)} | switches | {"help"}


def anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def test_picture_and_two_commands_stand_at_the_top():
    top = README.splitlines()[:25]
    first_image = re.search(r'<img src="([^"]+)" alt="([^"]+)"|!\[([^\]]+)\]\(([^)]+)\)', README)
    assert first_image[1] == "demo/before_after.png" and first_image[2]
    assert any(line.startswith("make demo") for line in top)
    assert any(line.startswith("make test") for line in top)


@every_page
def test_every_flag_named_exists(page):
    known = LAUNCH_FLAGS.union(trainer_flags(), *OWN_FLAGS.values(), {"index-url", "record"})  # of pip, and pytest here
    assert set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", PAGES[page])) - known == set()


def test_every_constant_has_a_comment_which_is_its_help():
    from train_manga_lora import TrainingConfig

    body = (ROOT / "train_manga_lora.py").read_text(encoding="utf-8").split("class TrainingConfig:")[1]
    comments = dict(re.findall(r"^    (\w+): [^=]+ = .*?  # (\S.*)$", body.split("\n\n\n")[0], re.MULTILINE))
    assert list(comments) == [field.name for field in dataclasses.fields(TrainingConfig)]


@every_page
def test_every_link_leads_to_a_file_and_a_section_of_it(page):
    links = re.findall(r'\]\(([^)\s]+)\)|<img src="([^"]+)"', PAGES[page])
    for link in (link for pair in links for link in pair if link and not link.startswith("http")):
        file, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


@every_page
def test_every_path_named_exists(page):
    if page == "CHANGELOG.md":  # which tells where things were before
        return
    text = re.sub(r"https?://\S+|\]\([^)\s]+\)", "", PAGES[page])  # links have their own test
    folders = "training|evaluation|demo|bench|docs|tests|.ci"
    inside = {path.rstrip("./") for path in re.findall(rf"(?<![\w/.])(?:{folders})/[\w./-]*", text)}
    top_level = set(re.findall(r"(?<![\w/\\-])(\w+\.(?:py|toml)|constraints\.txt|requirements\.txt)\b", text))
    if page == "CONTRIBUTING.md":  # whose list of modules names the folder once
        top_level -= {path.name for folder in ("training", "evaluation") for path in (ROOT / folder).glob("*.py")}
    assert sorted(path for path in inside | top_level if not (ROOT / path).exists()) == []


def test_every_page_is_linked_from_the_readme():
    pages = [path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")] + list(NAMES[1:])
    assert [page for page in pages if f"]({page})" not in README] == []


def test_every_module_has_its_place_in_contributing():
    folders = [ROOT, ROOT / "training", ROOT / "evaluation"]
    modules = {path.name for folder in folders for path in folder.glob("*.py")} - {"__init__.py"}
    assert {name for name in modules if f"`{name}`" not in PAGES["CONTRIBUTING.md"]} == set()


@pytest.mark.parametrize("words", commands(*NAMES).values(), ids=" ".join)
def test_command_can_be_run(words):
    from train_manga_lora import TrainingConfig, parse_arguments

    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in words[1:])
        return
    script = next(index for index, word in enumerate(words) if word.endswith((".py", ".sh")))
    assert (ROOT / words[script]).is_file()
    if words[0] == "accelerate":
        assert words[1] == "launch"
        assert {word.removeprefix("--") for word in words[2:script] if word.startswith("--")} <= LAUNCH_FLAGS
    taken = trainer_flags() if words[script] in TAKE_ITS_CONSTANTS else set()
    named = {word.removeprefix("--") for word in words[script + 1 :] if word.startswith("--")}
    assert named <= taken | OWN_FLAGS.get(words[script], set())
    if words[script] == "train_manga_lora.py":
        assert isinstance(parse_arguments(words[script + 1 :]), TrainingConfig)


def test_there_are_commands_to_check():
    expected = {"make demo", "make test", "python train_manga_lora.py", "python train_manga_lora.py --dry_run"}
    assert expected <= commands("README.md").keys()


def test_inference_snippet_is_the_originals_but_for_the_model_id():
    from training.bases import MIRRORS

    gone = "runwayml/stable-diffusion-v1-5"
    assert ORIGINAL_SNIPPET.replace(gone, MIRRORS[gone]) in fences("README.md", "python")


def test_module_and_parameter_counts_are_those_of_sd15_at_rank_16():
    rank, text_width = 16, 768
    blocks = [320] * 5 + [640] * 5 + [1280] * 6  # 2 down and 3 up at each of three widths, 1 in the middle
    self_attention = sum(4 * 2 * width for width in blocks)
    cross_attention = sum(2 * 2 * width + 2 * (width + text_width) for width in blocks)
    method = " ".join(METHOD.split())
    assert f"{len(blocks) * 2 * 4} modules" in method
    assert f"{rank * (self_attention + cross_attention):,} parameters" in method


def test_exit_codes_are_those_of_the_code():
    table = README.split("| exit code | meaning |")[1].split("\n\n")[0]
    listed = {int(code) for cell in re.findall(r"^\| ([\d, ]+) \|", table, re.MULTILINE) for code in cell.split(",")}
    files = [ROOT / "train_manga_lora.py", ROOT / "lora_layers.py"]
    files += [path for folder in ("training", "evaluation") for path in (ROOT / folder).glob("*.py")]
    source = "".join(path.read_text(encoding="utf-8") for path in files)
    used = {int(code) for code in re.findall(r"\b(?:Stop\(|exit_with\(|exit_code = )\s*(\d+)", source)}
    assert listed == used | {0, 128 + 2, 128 + 15}  # SIGINT, SIGTERM


def test_metrics_columns_are_those_of_the_code():
    from training.folder import METRICS

    assert f"`{', '.join(METRICS)}`" in " ".join(METHOD.split())


def test_where_to_change_what_names_what_is_there():
    rows = re.findall(r"^\| [^|]+ \| \[([\w./]+)\]\([^)]+\) \| `(\w+)` \|$", METHOD, re.MULTILINE)
    assert len(rows) >= 6
    for file, name in rows:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^ *(?:def|class) {name}\b|^{name}(?:: .*)? = ", source, re.MULTILINE), (file, name)


@pytest.mark.parametrize("function", ["main", "train"])
def test_a_run_is_told_in_the_order_of_the_code(function):
    import train_manga_lora

    told = METHOD.split(f"\n`{function}()`")[1].split("\n\n")[1]
    names = re.findall(r"^\d+\. `(\w+)`", told, re.MULTILINE)
    source = inspect.getsource(getattr(train_manga_lora, function))
    assert len(names) >= 6
    for name in names:
        found = re.search(rf"\b{name}\b", source)
        assert found, f"{name} is not called, or earlier than told"
        source = source[found.end() :]


def test_tables_of_speed_are_those_of_the_result_files():
    sys.path.insert(0, str(ROOT / "bench"))
    import bench_scale
    import bench_training

    results = ROOT / "bench" / "results"
    assert bench_training.results_table(sorted(results.glob("*.json"))) in RESULTS, (
        "bench_training.py --table prints it"
    )
    scale = json.loads((results / "scale" / "demo.json").read_text(encoding="utf-8"))
    assert bench_scale.table(scale) in RESULTS, "bench_scale.py --table prints it"


def test_tables_of_the_ablation_are_those_of_the_result_files():
    sys.path.insert(0, str(ROOT / "bench"))
    import ablation

    table = ablation.results_table(json.loads(ablation.RESULT.read_text(encoding="utf-8")))
    assert table in RESULTS, "python bench/ablation.py --table prints it"


def promises_table() -> str:
    tried = json.loads((ROOT / "tests" / "promises.json").read_text(encoding="utf-8"))
    rows = [f"| {name} | {count} |" for name, count in (tried | {"all": sum(tried.values())}).items()]
    return "\n".join(["| promise | cases tried, none failed |", "|---|---|", *rows])


def test_table_of_promises_is_that_of_the_last_recorded_test_run():
    assert promises_table() in METHOD, "run `python tests/test_readme.py` and paste what it prints"
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    promised = re.findall(r'promise\("(.+?)"\)', tests)
    assert set(promised) == set(json.loads((ROOT / "tests" / "promises.json").read_text(encoding="utf-8")))


@every_page
def test_every_figure_is_measured(page):
    assert re.findall(r"MEASURE\([^)]*\)", PAGES[page]) == []


@every_page
def test_pages_have_no_emojis(page):
    assert re.findall("[\U0001f300-\U0001faff\u2600-\u27bf]", PAGES[page]) == []


def test_readme_is_short_and_leaves_jargon_to_the_docs():
    assert len(README.split()) <= 2500
    assert [word for word in ("w_loss", "effective sample size", "bilevel") if word in README] == []


def test_contributing_is_short():
    assert len(PAGES["CONTRIBUTING.md"].splitlines()) <= 40


if __name__ == "__main__":
    print(promises_table())

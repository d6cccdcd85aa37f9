"""The README is held to the code. `python tests/test_readme.py` prints its table of constants anew."""

import ast
import dataclasses
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPT = (ROOT / "train_manga_lora.py").read_text(encoding="utf-8")
LAUNCH_FLAGS = {  # of accelerate launch
    "num_processes", "multi_gpu", "cpu", "num_machines", "machine_rank", "main_process_ip", "main_process_port",
}
BENCH_FLAGS = {"model", "rows", "steps", "warmup", "stage", "rate", "seeds", "out"}
OTHER_FLAGS = {"lora", "index-url", "help", "record", "dist"} | LAUNCH_FLAGS | BENCH_FLAGS  # other programs
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


def declared_constants() -> list[tuple[str, str, str]]:
    """(name, default as written, comment) of every field of TrainingConfig, from the source."""
    body = SCRIPT.split("class TrainingConfig:")[1].split("\n\n\n")[0]
    rows = re.findall(r"^    (\w+): [^=]+ = (.*?)  # (.*)$", body, re.MULTILINE)
    prompts = len(re.findall(r'^        ".*",$', body, re.MULTILINE))
    return [(name, f"{prompts} prompts" if default == "(" else default, comment) for name, default, comment in rows]


def constants_table() -> str:
    rows = [f"| {name} | `{default}` | {comment} |" for name, default, comment in declared_constants()]
    return "\n".join(["| name | default | meaning |", "|---|---|---|", *rows])


def fences(language: str) -> list[str]:
    """The contents of the fenced blocks marked with this language ("" = none)."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [content for marked, content in blocks if marked == language]


def commands() -> list[list[str]]:
    """Every command of the fenced blocks that starts with python, accelerate or make, as words."""
    lines = "".join(fences("bash") + fences("powershell")).splitlines()
    words = [shlex.split(line.replace("\\", "/"), comments=True) for line in lines]
    return [line for line in words if line and line[0] in ("python", "accelerate", "make")]


def test_table_of_constants_is_that_of_the_code():
    table = README.split("## All constants")[1].split("\n\n")
    assert constants_table() in table, "run `python tests/test_readme.py` and paste what it prints"


def test_table_of_constants_lists_every_field_with_its_real_default():
    from train_manga_lora import TrainingConfig

    fields = dataclasses.fields(TrainingConfig)
    declared = declared_constants()
    assert [name for name, _, _ in declared] == [field.name for field in fields]
    for (name, default, comment), field in zip(declared, fields, strict=True):
        if field.name == "sample_prompts":
            assert default == f"{len(field.default)} prompts"
        else:
            assert ast.literal_eval(default) == field.default, name
        assert comment and "|" not in comment, name


def test_sample_prompts_are_those_of_the_code():
    from train_manga_lora import TrainingConfig

    assert "\n".join(TrainingConfig.sample_prompts) + "\n" in fences("")


def test_picture_and_two_commands_stand_at_the_top():
    top = README.splitlines()[:25]
    first_image = re.search(r'<img src="([^"]+)" alt="([^"]+)"|!\[([^\]]+)\]\(([^)]+)\)', README)
    assert first_image[1] == "demo/before_after.png" and first_image[2]
    assert any(line.startswith("make demo") for line in top)
    assert any(line.startswith("make test") for line in top)


def test_every_flag_named_exists():
    from train_manga_lora import TrainingConfig

    known = {field.name for field in dataclasses.fields(TrainingConfig)} | OTHER_FLAGS
    known |= {f"no-{field.name}" for field in dataclasses.fields(TrainingConfig) if field.type is bool}
    named = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", README)) - {"name"}  # `--name value` stands for any of them
    assert named - known == set()


def test_every_path_named_exists():
    links = {link for link in re.findall(r"\]\(([^)\s]+)\)", README) if not link.startswith(("http", "#"))}
    sources = set(re.findall(r'<img src="([^"]+)"', README))
    inside = {path.rstrip("./") for path in re.findall(r"(?<![\w/])(?:demo|tests|\.ci)/[\w./-]+", README)}
    top_level = set(re.findall(r"(?<![\w/\\-])(\w+\.(?:py|toml)|constraints\.txt|requirements\.txt)\b", README))
    missing = sorted(path for path in links | sources | inside | top_level if not (ROOT / path).exists())
    assert missing == []


def test_every_link_to_a_section_leads_somewhere():
    titles = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= anchors


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_command_can_be_run(words):
    from train_manga_lora import TrainingConfig, parse_arguments

    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in words[1:])
        return
    script = next(index for index, word in enumerate(words) if word.endswith(".py"))
    assert (ROOT / words[script]).is_file()
    if words[0] == "accelerate":
        assert words[1] == "launch"
        launch = {word.removeprefix("--") for word in words[2:script] if word.startswith("--")}
        assert launch <= LAUNCH_FLAGS
    if words[script] == "train_manga_lora.py":
        assert isinstance(parse_arguments(words[script + 1 :]), TrainingConfig)


def test_there_are_commands_to_check():
    found = {" ".join(words) for words in commands()}
    assert {"make demo", "make test", "python train_manga_lora.py", "python train_manga_lora.py --dry_run"} <= found


def test_inference_snippet_is_the_originals_but_for_the_model_id():
    from train_manga_lora import MIRRORS, TrainingConfig

    mirror = MIRRORS["runwayml/stable-diffusion-v1-5"]
    assert mirror == TrainingConfig.pretrained_model
    assert ORIGINAL_SNIPPET.replace("runwayml/stable-diffusion-v1-5", mirror) in fences("python")


def test_module_and_parameter_counts_are_those_of_sd15_at_rank_16():
    rank, text_width = 16, 768
    blocks = [320] * 5 + [640] * 5 + [1280] * 6  # 2 down and 3 up at each of three widths, 1 in the middle
    self_attention = sum(4 * 2 * width for width in blocks)
    cross_attention = sum(2 * 2 * width + 2 * (width + text_width) for width in blocks)
    assert f"{len(blocks) * 2 * 4} modules" in README
    assert f"{rank * (self_attention + cross_attention):,} parameters" in README


def test_exit_codes_are_those_of_the_code():
    table = README.split("| exit code | meaning |")[1].split("\n\n")[0]
    listed = {int(code) for cell in re.findall(r"^\| ([\d, ]+) \|", table, re.MULTILINE) for code in cell.split(",")}
    used = {int(code) for code in re.findall(r"\bStop\((\d+),", SCRIPT)}
    assert listed == used | {0, 128 + 2, 128 + 15}  # SIGINT, SIGTERM


def test_metrics_columns_are_those_of_the_code():
    from checkpoint import METRICS

    assert f"per optimizer step: {', '.join(METRICS)} |" in README


def test_files_are_all_listed_with_about_their_length():
    rows = re.findall(r"^\| \[([\w./]+\.py)\]\([^)]+\) \| (\d+) \|", README, re.MULTILINE)
    here = {path.relative_to(ROOT).as_posix() for folder in (ROOT, ROOT / "demo", ROOT / "bench")
            for path in folder.glob("*.py")}
    assert {name for name, _ in rows} == here
    for name, told in rows:
        lines = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        assert abs(lines - int(told)) <= 0.1 * lines, f"{name}: {told} told, {lines} counted"


def test_tables_of_speed_are_those_of_the_result_files():
    sys.path.insert(0, str(ROOT / "bench"))
    import bench_scale
    import bench_training

    results = ROOT / "bench" / "results"
    assert bench_training.results_table(sorted(results.glob("*.json"))) in README, "bench_training.py --table prints it"
    scale = json.loads((results / "scale" / "demo.json").read_text(encoding="utf-8"))
    assert bench_scale.table(scale) in README, "bench_scale.py --table prints it"


def test_tables_of_the_ablation_are_those_of_the_result_files():
    sys.path.insert(0, str(ROOT / "bench"))
    import ablation

    table = ablation.results_table(sorted((ROOT / "bench" / "results" / "ablation").glob("*.json")))
    assert table in README, "python bench/ablation.py --table prints it"


def promises_table() -> str:
    tried = json.loads((ROOT / "tests" / "promises.json").read_text(encoding="utf-8"))
    rows = [f"| {name} | {count} |" for name, count in (tried | {"all": sum(tried.values())}).items()]
    return "\n".join(["| promise | cases tried, none failed |", "|---|---|", *rows])


def test_table_of_promises_is_that_of_the_last_recorded_test_run():
    assert promises_table() in README, "run `python tests/test_readme.py` and paste what it prints"
    promised = re.findall(r'promise\("(.+?)"\)', "".join(path.read_text(encoding="utf-8") for path in
                                                         (ROOT / "tests").glob("test_*.py")))  # fmt: skip
    assert set(promised) == set(json.loads((ROOT / "tests" / "promises.json").read_text(encoding="utf-8")))


def test_every_figure_is_measured():
    assert re.findall(r"MEASURE\([^)]*\)", README) == []


def test_readme_is_plain():
    assert len(README.splitlines()) <= 650
    assert re.findall("[\U0001f300-\U0001faff\u2600-\u27bf]", README) == []


if __name__ == "__main__":
    print(constants_table(), promises_table(), sep="\n\n")

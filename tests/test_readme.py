"""The README's commands: every one exists with the flags and settings it names, and they run, in its order, on tiny settings.

The commands are taken from the README as they stand and run by bash in a copy of the repository, without a network.
"""

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pyarrow
import pyarrow.parquet
import pytest

from config.compose import compose_as, compose_config
from config.schema import PretrainPuzzleConfig
from tests.puzzle_data import PUZZLE_PRESETS

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text()
ENTRY_SCRIPTS = ("pretrain_instruct.py", "inference_instruct.py", "generate_instruct.py")
# They run elsewhere: quickstart in its own test, test.sh is running now, benchmarks and the server have test files of their own.
RUN_ELSEWHERE = ("scripts/quickstart.sh", "scripts/test.sh", "scripts/serve.py", "benchmarks/")
TINY = (
    "device=cpu arch.hidden_size=32 arch.num_heads=2 arch.expansion=1 arch.H_cycles=1 arch.L_cycles=1 arch.L_layers=1 "
    "arch.halt_max_steps=2 arch.forward_dtype=float32 sample_answers=1 generation.max_output_tokens=4"
)
in_venv = pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="the scripts look for a virtual environment")


def readme_commands() -> list[str]:
    """Every command in the README's bash blocks, continued lines joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


COMMANDS = readme_commands()


def words_of(command: str) -> list[str]:
    """The words of a command without leading VAR=value and without the interpreter."""
    words = shlex.split(command)
    while words and re.match(r"[A-Z_]+=", words[0]):
        del words[0]
    return words[1:] if words[:1] == ["python"] else words


def help_of(words: list[str], kind: Sequence[str] = ()) -> str:
    """What the Python program that `words` start with says to --help, or its command `kind`."""
    shown = io.StringIO()
    program = words[1] if words[0] == "-m" else words[0]
    run = runpy.run_module if words[0] == "-m" else runpy.run_path
    with mock.patch("sys.argv", [program, *kind, "--help"]), contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as stop:
        run(program if words[0] == "-m" else str(REPOSITORY / program), run_name="__main__")
    assert not stop.value.code
    return shown.getvalue()


def flags_in(help_text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", help_text))


def test_the_first_screen_is_two_commands() -> None:
    assert COMMANDS[:2] == ["scripts/quickstart.sh", "scripts/test.sh"]
    assert README.index("scripts/test.sh") < 800


@pytest.mark.parametrize("command", COMMANDS)
def test_the_program_its_flags_and_its_settings_exist(command: str) -> None:
    words = words_of(command)
    if not words or words[0] in ("export", "source"):
        return
    if words[0] == "-m":
        assert find_spec(words[1]) is not None
    else:
        assert (REPOSITORY / words[0]).is_file()
    if words[0].endswith(".sh"):
        assert os.access(REPOSITORY / words[0], os.X_OK)
    if words[0] == "pretrain.py":
        compose_as(PretrainPuzzleConfig, "cfg_pretrain", words[1:])
    elif words[0].endswith(".sh") or words[0] == "pretrain_instruct.py":
        compose_config("cfg_pretrain_instruct", words[1:])
    else:
        used = {word for word in words[1:] if re.match(r"--?[A-Za-z]", word)} - {"-m"}
        assert used <= flags_in(help_of(words))


def test_every_preset_that_is_named_exists() -> None:
    pages = [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md"), *(REPOSITORY / "scripts").glob("*.sh")]
    named = {name for page in pages for name in re.findall(r"experiment=([a-z]\w*)", page.read_text())}
    assert named
    for name in named:
        if name in PUZZLE_PRESETS:
            compose_as(PretrainPuzzleConfig, "cfg_pretrain", [f"experiment={name}"])
        else:
            compose_config("cfg_pretrain_instruct", [f"experiment={name}"])


@pytest.mark.parametrize("script", ENTRY_SCRIPTS[1:])
def test_every_flag_of_a_script_is_documented(script: str) -> None:
    documented = flags_in((REPOSITORY / "docs/instruct_training.md").read_text())
    assert flags_in(help_of([script])) - {"-h", "--help"} <= documented


BUILDERS = tuple(f"dataset/build_{name}.py" for name in ("arc_dataset", "sudoku_dataset", "maze_dataset", "small_puzzles"))


def test_the_commands_for_puzzles_exist_and_every_flag_is_documented() -> None:
    pages = [(REPOSITORY / f"docs/{name}.md").read_text() for name in ("puzzle_data", "TINYRECURSIVEMODELS_README", "sudoku")]
    blocks = [page.replace("\\\n", " ") for page in pages]
    commands = {line.strip() for block in blocks for line in re.findall(r"^    (?:python|pip) .*", block, re.MULTILINE)}
    assert len(commands) >= 8
    for command in commands:
        words = words_of(command)
        if words[0] == "pip":
            assert (REPOSITORY / words[-1]).is_file()
            continue
        if words[0] == "pretrain.py":
            compose_as(PretrainPuzzleConfig, "cfg_pretrain", words[1:])
            continue
        kind = words[2:3] if "dataset.build_small_puzzles" in words else []
        assert {word for word in words[1:] if word.startswith("--")} <= flags_in(help_of(words, kind))
    for builder in BUILDERS:
        kinds = (["sudoku"], ["maze"]) if "small" in builder else ([],)
        flags = set().union(*(flags_in(help_of([builder], kind)) for kind in kinds))
        assert flags - {"-h", "--help", "--no-aug"} <= flags_in(pages[0])
    assert flags_in(help_of(["inference.py"])) - {"-h", "--help"} <= flags_in(pages[1])


PAGES = ["README.md", "AGENTS.md", "docs/quickstart.ipynb", *sorted(f"docs/{p.name}" for p in (REPOSITORY / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", (REPOSITORY / page).read_text())
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not ((REPOSITORY / page).parent / target).exists()] == []


def fresh_copy(folder: Path) -> Path:
    """The program without anything made on this machine, with this test's environment as its `.venv`, installed already."""
    made = shutil.ignore_patterns("__pycache__", "tokenizer*.model", "llama-32k")
    packages = (
        "artifacts config dataset evaluators generation models scripts tokenizers training requirements.txt requirements-dev.txt"
    )
    for name in [*packages.split(), *ENTRY_SCRIPTS]:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=made)
        else:
            folder.mkdir(exist_ok=True)
            shutil.copy(source, folder / name)
    environment = folder / ".venv"
    environment.mkdir()
    for part in ("bin", "lib", "pyvenv.cfg"):
        (environment / part).symlink_to(Path(sys.prefix) / part)
    checksum = subprocess.run("cat requirements*.txt | cksum", shell=True, cwd=folder, capture_output=True, check=True)
    (environment / ".installed-requirements.txt").write_bytes(checksum.stdout)
    return folder


def run_bash(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `script` with bash in `folder`, no network. Fails with everything it printed."""
    settings = {
        **{
            key: value
            for key, value in os.environ.items()
            if key not in ("LLAMA_TOKENIZER", "VENV", "HF_HUB_OFFLINE", "PYTHONDONTWRITEBYTECODE")
        },
        # An environment that was moved activates the place where it was made.
        "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "PIP_NO_INDEX": "1",
        "WANDB_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=folder, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@in_venv
def test_the_commands_run_in_the_readmes_order(tmp_path: Path) -> None:
    folder = fresh_copy(tmp_path / "clone")
    slimorca = folder / "data/slimorca_full"
    slimorca.mkdir(parents=True)
    turns = [("human", "What is {}?"), ("gpt", "It is {}.")]
    rows = [{"conversations": [{"from": who, "value": text.format(i)} for who, text in turns]} for i in range(64)]
    (slimorca / "SlimOrca.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "data/mine").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "data/mine/rows.parquet")

    script = []
    for command in COMMANDS:
        words = words_of(command)
        program = words[0] if words else ""
        if program.startswith(RUN_ELSEWHERE) or "dataset=hub" in words:  # tests/test_hub.py has a stand-in for it
            continue
        is_training = program in ("pretrain_instruct.py", "scripts/pretrain_instruct_smoke.sh")
        script.append(f"{command} {TINY}" if is_training else command)
    smoke = {"SMOKE_SUBSET_SIZE": "16", "SMOKE_GLOBAL_BATCH": "4", "SMOKE_EPOCHS": "1"}
    done = run_bash("\n".join(script), folder, **smoke)

    assert "using the bundled data instead" in done.stdout
    assert "ACT steps)" in done.stdout  # generation with -V
    checkpoints = sorted((folder / "checkpoints").glob("*/*/step_*"), key=lambda path: path.stat().st_mtime)
    assert [path.parents[1].name for path in checkpoints] == ["Sample-ACT", "SlimOrca-ACT", "SlimOrca-ACT"]
    smoke_metrics, own_metrics, full_metrics = (json.loads((path / "train_metrics.json").read_text()) for path in checkpoints)
    assert smoke_metrics["examples"] == 16
    assert own_metrics["test"]["counts"] == full_metrics["test"]["counts"]
    # Without a subset, every row is trained on or tested.
    assert full_metrics["examples"] + full_metrics["test"]["counts"]["conversations"] == 64
    measured = json.loads((checkpoints[-1] / "metrics.json").read_text())
    assert measured["counts"] == full_metrics["test"]["counts"]
    assert (checkpoints[-1] / "outputs_test.safetensors").is_file()


@pytest.mark.slow
@in_venv
def test_quickstart_runs_and_then_reuses_what_is_there(tmp_path: Path) -> None:
    folder = fresh_copy(tmp_path / "clone")
    script = f"scripts/quickstart.sh {TINY} dataset.subset_size=64 epochs=1"
    first = run_bash(script, folder)
    assert "== done in" in first.stdout
    [checkpoint] = (folder / "checkpoints/Sample-ACT/quickstart").glob("step_*")
    assert json.loads((checkpoint / "metrics.json").read_text())["answers"]["families"]["two_turn"]["count"] > 0
    weights = (checkpoint / "model.safetensors").stat().st_mtime_ns
    second = run_bash(script, folder)
    assert "reusing checkpoints/Sample-ACT/quickstart" in second.stdout
    assert (checkpoint / "model.safetensors").stat().st_mtime_ns == weights


def test_all_name_the_same_versions_of_python() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11,<3.13"
    for name in ("README.md", "requirements.txt", "scripts/environment.sh"):
        assert "Python 3.11 or 3.12" in (REPOSITORY / name).read_text(), name

"""A run goes on from where it was, exactly, whatever ended it; and where it can't, it says so instead of beginning again."""

import itertools
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

import artifacts.run_folder
from artifacts.checkpoint import checkpoints_of, newest_checkpoint, step_of
from config.errors import UsageError
from config.schema import PretrainInstructConfig
from dataset.text.tokenizer import Tokenizer
from models.distributed import Ranks
from tests.children import Child
from tests.conftest import SHORT_RUN
from training.instruct_run import run_instruct
from training.loop import Run
from training.resume import find_resume_point

RunConfig = Callable[..., PretrainInstructConfig]


@pytest.fixture(scope="module")
def undisturbed(run_config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run that nothing has happened to, with all of its checkpoints."""
    return run_instruct(run_config(tmp_path_factory.mktemp("undisturbed"))).checkpoint.parent


@pytest.fixture
def killed(undisturbed: Path, tmp_path: Path) -> Path:
    """A copy of that run as a kill would have left it: three checkpoints, the log further on, a folder half written."""
    run = tmp_path / "SlimOrca-ACT/run"
    shutil.copytree(undisturbed, run)
    for folder in checkpoints_of(run)[3:]:
        shutil.rmtree(folder)
    (run / ".step_16.partial/trainer").mkdir(parents=True)
    return run


def contents(run: Path) -> dict[str, Any]:
    """What must be equal at the end of a run."""
    last = checkpoints_of(run)[-1]
    return {
        "step": step_of(last),
        "metrics": (run / "metrics.jsonl").read_bytes(),
        "train_metrics": (last / "train_metrics.json").read_bytes(),
        **{name: load_file(last / f"{name}.safetensors") for name in ("model", "ema", "trainer/tensors")},
    }


def timing_of(run: Path) -> list[tuple[int, float]]:
    """Each line's step, and its tokens as its speed and time say."""
    lines = [json.loads(line) for line in (run / "timing.jsonl").read_text().splitlines()]
    seconds = [0.0, *(line["seconds"] for line in lines)]
    return [
        (line["step"], line["tokens_per_second"] * (now - before))
        for line, now, before in zip(lines, seconds[1:], seconds[:-1], strict=True)
    ]


def assert_the_same_run(run: Path, other: Path) -> None:
    """Bit for bit: weights, average, optimizer and metrics.jsonl."""
    found, expected = contents(run), contents(other)
    for name, value in expected.items():
        if isinstance(value, dict):
            assert found[name].keys() == value.keys()
            for key, tensor in value.items():
                assert torch.equal(found[name][key], tensor), f"{name}: {key}"
        else:
            assert found[name] == value, name
    steps, tokens = zip(*timing_of(run), strict=True)
    assert list(steps) == sorted(set(steps)), "timing.jsonl is cut back, too"
    assert dict(timing_of(other)) == pytest.approx(dict(zip(steps, tokens, strict=True))), (
        "the time of a line half summed up counts"
    )


def test_the_run_is_one_in_which_a_resume_could_go_wrong(undisturbed: Path) -> None:
    folders = checkpoints_of(undisturbed)
    assert len(folders) > 8
    states = [json.loads((folder / "trainer/state.json").read_text()) for folder in folders]
    assert any(state["window"]["steps"] for state in states), "a line half summed up"
    tests = [line for line in (undisturbed / "metrics.jsonl").read_text().splitlines() if '"test"' in line]
    assert len(tests) == 3


def test_a_run_goes_on_bit_for_bit(
    killed: Path, undisturbed: Path, run_config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    before = checkpoints_of(killed)
    run_instruct(run_config(killed.parents[1], "resume=auto"))
    assert f"resuming from {before[-1]}" in capsys.readouterr().out
    assert_the_same_run(killed, undisturbed)
    assert not list(killed.glob(".step_*"))
    # Through already: nothing is trained, nothing is lost.
    assert run_instruct(run_config(killed.parents[1], "resume=auto")).checkpoint == checkpoints_of(killed)[-1]
    assert_the_same_run(killed, undisturbed)


@pytest.mark.parametrize(
    ("settings", "last"),
    [
        (("eval_every_steps=5", "max_steps=23", "early_stopping.patience=9"), 23),
        # Nothing but the first evaluation counts as lower.
        (("eval_every_steps=5", "early_stopping.patience=3", "early_stopping.min_delta=100", "eval_interval=9"), 20),
        (("eval_every_steps=auto", "eval_examples=1", "eval_interval=9", "max_steps=23", "optimizer=muon"), 23),
    ],
)
def test_a_run_with_limits_goes_on_bit_for_bit(
    run_config: RunConfig, tmp_path: Path, settings: tuple[str, ...], last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.stopping._LEAST_TRAINED_BETWEEN", 1)
    whole = run_instruct(run_config(tmp_path / "whole", *settings)).checkpoint.parent
    folders = checkpoints_of(whole)
    assert step_of(folders[-1]) == last and sum('"test"' in line for line in (whole / "metrics.jsonl").open()) >= 4
    for keep in (1, len(folders) // 2, len(folders) - 1):
        run = tmp_path / str(keep) / "SlimOrca-ACT/run"
        shutil.copytree(whole, run)
        for folder in checkpoints_of(run)[keep:]:
            shutil.rmtree(folder)
        run_instruct(run_config(tmp_path / str(keep), *settings, "resume=auto"))
        assert_the_same_run(run, whole)
        assert [folder.name for folder in checkpoints_of(run)] == [folder.name for folder in folders]


def test_a_run_that_the_clock_has_ended_goes_on_as_if_it_had_not(
    run_config: RunConfig, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights, logs and all, through several ends between lines, evaluations and saved steps; the time counts over restarts."""
    monkeypatch.setattr(Run, "_seconds", lambda run: 60.0 * run.trainer.progress.step)
    steps = []
    for minutes in (5, 7, 14.5, 22):
        result = run_instruct(run_config(tmp_path, "resume=auto", f"max_minutes={minutes}"))
        assert f": max_minutes={minutes} are over; to resume, raise it" in capsys.readouterr().out
        assert result.loss is not None
        steps.append(step_of(result.checkpoint))
    assert steps == [5, 7, 15, 22]
    assert run_instruct(run_config(tmp_path, "resume=auto", "max_minutes=20")) == result, "and ends at once where time is over"
    run_instruct(run_config(tmp_path, "resume=auto"))
    said = capsys.readouterr().out
    assert "with other settings" not in said
    assert_the_same_run(tmp_path / "SlimOrca-ACT/run", undisturbed)


def test_a_folder_can_be_named(killed: Path, undisturbed: Path, run_config: RunConfig, tmp_path: Path) -> None:
    [*_, middle, last] = checkpoints_of(killed)
    with pytest.raises(UsageError, match=r"newer checkpoints \(up to step_\d+\) and doesn't overwrite them"):
        run_instruct(run_config(tmp_path, f"resume={middle}"))
    with pytest.raises(UsageError, match="run_name is 'other'"):
        run_instruct(run_config(tmp_path, f"resume={last}", "run_name=other"))
    with pytest.raises(UsageError, match="no checkpoint there"):
        run_instruct(run_config(tmp_path, f"resume={tmp_path / 'nowhere'}"))
    # The name says where, not the settings; dots of another width behind the rows change nothing.
    run_instruct(run_config(tmp_path / "unused", f"resume={last}", "run_name=null", "dataloader_workers=3", "pad_multiple=16"))
    assert_same_numbers(killed, undisturbed)
    assert not (tmp_path / "unused").exists()


def assert_same_numbers(run: Path, other: Path, tolerance: float = 1e-4) -> None:
    weights, expected = (load_file(checkpoints_of(folder)[-1] / "model.safetensors") for folder in (run, other))
    assert step_of(checkpoints_of(run)[-1]) == step_of(checkpoints_of(other)[-1])
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=tolerance)


def test_without_resume_a_run_is_never_overwritten_nor_without_a_name_gone_on_with(
    killed: Path, run_config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match=r"not overwritten: resume with resume=auto"):
        run_instruct(run_config(tmp_path))
    with pytest.raises(UsageError, match="set run_name"):
        run_instruct(run_config(tmp_path, "resume=auto", "run_name=null"))
    run_instruct(run_config(tmp_path / "fresh", "resume=auto", "epochs=1"))
    assert "has no checkpoint yet: starting at step 0" in capsys.readouterr().out


def test_a_run_that_is_at_work_is_left_alone(run_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts.run_folder, "WAIT_SECONDS", 0.1)
    config = run_config(tmp_path, "resume=auto", "epochs=1000")
    run = tmp_path / "SlimOrca-ACT/run"
    with Child(config, tmp_path / "out") as child:
        while not checkpoints_of(run):
            assert child.phase != "finished"
            time.sleep(0.001)
        for resume in ("auto", run, checkpoints_of(run)[-1]):
            # A folder step_<N> may be the newest no more, which is told first.
            with pytest.raises(UsageError, match=r"in use by process|has newer checkpoints"):
                run_instruct(run_config(tmp_path, f"resume={resume}", "epochs=1000"))
        # Who only reads isn't kept out.
        assert newest_checkpoint(run, lambda _: None).parent == run
        assert child.phase != "finished"
        child.kill()
        assert "Traceback" not in child.text
    with find_resume_point(config, Ranks()) as resume_point:
        assert resume_point.saved is not None


def test_runs_without_a_name_that_start_together_have_a_folder_each(run_config: RunConfig, tmp_path: Path) -> None:
    config = run_config(tmp_path, "run_name=null", "epochs=1")
    children = [Child(config, tmp_path / f"out{number}") for number in range(2)]
    assert [child.end() for child in children] == [0, 0]
    folders = list((tmp_path / "SlimOrca-ACT").iterdir())
    assert len(folders) == 2 and all(checkpoints_of(folder) for folder in folders)


@pytest.mark.parametrize("override", ["run_name=../x", "project_name=/tmp/x", "run_name=step_3", "project_name=a/b"])
def test_a_run_stays_where_it_belongs(run_config: RunConfig, tmp_path: Path, override: str) -> None:
    with pytest.raises(UsageError, match=f"{override.split('=')[0]}=.*expected the name of one folder"):
        run_instruct(run_config(tmp_path / "runs", override))
    assert not (tmp_path / "runs").exists() and not (tmp_path / "x").exists()


def test_a_dry_run_changes_nothing(killed: Path, run_config: RunConfig) -> None:
    (checkpoints_of(killed)[-1] / "model.safetensors").write_bytes(b"")
    before = sorted(killed.rglob("*"))
    for overrides in (("resume=auto",), ("run_name=another",), ("run_name=null",)):
        run_instruct(run_config(killed.parents[1], "dry_run=true", *overrides))
    assert sorted(killed.rglob("*")) == before and list(killed.parent.iterdir()) == [killed]


class Code:
    """Unpickled, it runs."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return (Path.touch, (self.proof,))


DAMAGE: dict[str, tuple[str, Callable[[bytes, Path], bytes | None]]] = {
    "truncated weights": ("model.safetensors", lambda content, proof: content[:-9]),
    "truncated optimizer": ("trainer/tensors.safetensors", lambda content, proof: content[: len(content) // 2]),
    "pickled code": ("trainer/tensors.safetensors", lambda content, proof: pickle.dumps(Code(proof))),
    "pickled weights": ("model.safetensors", lambda content, proof: pickle.dumps(Code(proof))),
    "empty file": ("trainer/state.json", lambda content, proof: b""),
    "missing average": ("ema.safetensors", lambda content, proof: None),
    "foreign format": ("checkpoint.json", lambda content, proof: b'{"format_version": 0}'),
    "no settings": ("config.yaml", lambda content, proof: b"- 1"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_said_and_an_older_one_taken(
    killed: Path, run_config: RunConfig, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file, damage = DAMAGE[kind]
    [*_, older, newest] = checkpoints_of(killed)
    proof = killed / "proof"
    content = damage((newest / file).read_bytes(), proof)
    (newest / file).unlink()
    if content is not None:
        (newest / file).write_bytes(content)
    with find_resume_point(run_config(killed.parents[1], "resume=auto"), Ranks()) as resume_point:
        assert resume_point.saved is not None and resume_point.saved.folder == older
    said = capsys.readouterr().out
    assert str(newest) in said and "looking for an older checkpoint" in said and f"resuming from {older}" in said
    assert f"renamed {newest} to {newest}.damaged" in said and Path(f"{newest}.damaged").is_dir()
    assert not proof.exists()


def test_a_run_goes_on_exactly_from_an_older_checkpoint(killed: Path, undisturbed: Path, run_config: RunConfig) -> None:
    (checkpoints_of(killed)[-1] / "model.safetensors").write_bytes(b"")
    run_instruct(run_config(killed.parents[1], "resume=auto"))
    assert_the_same_run(killed, undisturbed)


def test_a_run_without_a_whole_checkpoint_is_not_begun_again(killed: Path, run_config: RunConfig) -> None:
    for folder in checkpoints_of(killed):
        (folder / "trainer/tensors.safetensors").write_bytes(b"")
    before = sorted(killed.rglob("*"))
    with pytest.raises(UsageError, match=r"no checkpoint in .* is intact .*the run doesn't start over"):
        run_instruct(run_config(killed.parents[1], "resume=auto"))
    with pytest.raises(UsageError, match="is intact"):
        run_instruct(run_config(killed.parents[1], f"resume={checkpoints_of(killed)[-1]}"))
    assert [path for path in sorted(killed.rglob("*")) if ".partial" not in str(path)] == [
        path for path in before if ".partial" not in str(path)
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("global_batch_size=5", "global_batch_size was 4, now 5"),
        ("arch.hidden_size=32", "arch.hidden_size was 16, now 32"),
        ("seed=1", "seed was 0, now 1"),
        ("ema=false", "ema was True, now False"),
        ("optimizer=muon", "optimizer was adam_atan2, now muon"),
        ("dataset.test_ratio=0.4", "its data_hash is"),
    ],
)
def test_a_run_does_not_go_on_as_another(killed: Path, run_config: RunConfig, override: str, message: str) -> None:
    before = (killed / "metrics.jsonl").read_bytes()
    with pytest.raises(UsageError, match="can't be resumed") as error:
        run_instruct(run_config(killed.parents[1], "resume=auto", override))
    assert message in str(error.value) and "start another run" in str(error.value)
    assert (killed / "metrics.jsonl").read_bytes() == before


def test_a_checkpoint_of_an_earlier_version_goes_on(
    killed: Path, undisturbed: Path, run_config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """A key that was not there yet counts as what the program did then."""
    path = checkpoints_of(killed)[-1] / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    for section, key in (
        (settings, "packing"),
        (settings, "lr_schedule"),
        (settings["dataset"], "supervise"),
        (settings["arch"], "mlp_t"),
    ):
        del section[key]
    path.write_text(yaml.safe_dump(settings))
    config = run_config(killed.parents[1], "resume=auto")
    said: list[str] = []
    with find_resume_point(config, Ranks()) as resume_point:
        resume_point.check(config.model_copy(update={"lr_schedule": "stage"}), {}, said.append)
    assert len(said) == 1 and said[0].endswith("same run: lr_schedule was run, now stage")
    run_instruct(config)
    assert "other settings" not in capsys.readouterr().out
    assert_the_same_run(killed, undisturbed)


def test_settings_that_change_what_comes_of_a_run_are_said(
    killed: Path, run_config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run_instruct(run_config(killed.parents[1], "resume=auto", "lr=2e-3", "log_interval=7", "generation.seed=3"))
    assert "not exactly the same run: lr was 0.001, now 0.002\n" in capsys.readouterr().out


def test_only_the_newest_and_the_best_are_kept(run_config: RunConfig, tmp_path: Path) -> None:
    keep = ("checkpoint.keep_last=2", "checkpoint.keep_best=1", "epochs=4")
    last = run_instruct(run_config(tmp_path, *keep)).checkpoint
    log = [json.loads(line) for line in (last.parent / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["test"]["loss_per_token"] for line in log if "test" in line}
    best = min(losses, key=lambda step: losses[step])
    kept = [step_of(folder) for folder in checkpoints_of(last.parent)]
    assert kept[-1] == step_of(last) and best in kept and len(kept) == (2 if best in kept[-2:] else 3)
    assert not list(last.parent.glob(".step_*"))


def test_the_clock_saves_too(run_config: RunConfig, tmp_path: Path) -> None:
    last = run_instruct(run_config(tmp_path, "checkpoint.every_steps=null", "checkpoint.every_minutes=1e-9", "epochs=1")).checkpoint
    assert [step_of(folder) for folder in checkpoints_of(last.parent)] == list(range(1, step_of(last) + 1))


def test_weights_alone_begin_another_run(
    undisturbed: Path, run_config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_tokenizer: Tokenizer
) -> None:
    source = checkpoints_of(undisturbed)[-1]
    still = ("lr=1e-30", "weight_decay=0", "epochs=1", "seed=5")
    last = run_instruct(run_config(tmp_path, f"load_checkpoint={source}", *still)).checkpoint
    said_first = capsys.readouterr().out
    assert f"starting from the weights of {source}" in said_first and "other setting" not in said_first
    run_instruct(
        run_config(tmp_path / "again", f"load_checkpoint={undisturbed}", *still, "dataset.seq_len=48", "arch.loss=stablemax")
    )
    said = capsys.readouterr().out.splitlines()
    assert f"{undisturbed}: using its newest checkpoint, {source.name}" in said
    # Of all that differs, what the weights were learned under.
    assert [line for line in said if "other setting" in line] == [
        "  other setting: arch.loss was 'softmax', now 'stablemax'",
        "  other setting: dataset.seq_len was 64, now 48",
    ]
    weights, average = load_file(last / "model.safetensors"), load_file(source / "ema.safetensors")
    assert all(torch.equal(value, average[name]) for name, value in weights.items()), "the average, not the last weights"
    admitted = [json.loads((folder / "trainer/state.json").read_text())["admitted"] for folder in (last, source)]
    assert 3 * admitted[0] == admitted[1], "a schedule of its own"
    with pytest.raises(UsageError, match="expected shape"):
        run_instruct(run_config(tmp_path / "wider", f"load_checkpoint={source}", "arch.hidden_size=32"))
    with pytest.raises(UsageError, match="can't be read"):
        run_instruct(run_config(tmp_path / "nowhere", f"load_checkpoint={tmp_path / 'gone'}"))
    other = tmp_path / "other.model"
    # An unknown protobuf field at the end: the same pieces, another file.
    other.write_bytes(tiny_tokenizer.model_bytes + b"\xa2\x06\x01x")
    with pytest.raises(UsageError, match="another tokenizer"):
        run_instruct(run_config(tmp_path / "t", f"load_checkpoint={source}", f"dataset.tokenizer_path={other}"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_that_can_go_on(run_config: RunConfig, undisturbed: Path, tmp_path: Path, number: int) -> None:
    config = run_config(tmp_path, "resume=auto", "checkpoint.every_steps=null")
    run = tmp_path / "SlimOrca-ACT/run"
    with Child(config, tmp_path / "out") as child:
        assert child.wait_for("training")
        child.send(number)
        assert child.end() == 128 + number
        assert f"{signal.Signals(number).name}: saved {checkpoints_of(run)[-1]}" in child.text and "Traceback" not in child.text
    assert step_of(checkpoints_of(run)[-1]) < step_of(checkpoints_of(undisturbed)[-1])
    run_instruct(config)
    assert_the_same_run(run, undisturbed)


def kill_and_go_on(config: PretrainInstructConfig, out: Path, moments: Iterator[Callable[[Child], object]]) -> list[str]:
    """Kill a run at each of the moments until it is through; the phases in which it died."""
    phases = []
    for moment in moments:
        with Child(config, out) as child:
            moment(child)
            phase = child.kill()
        if phase == "finished":
            return phases
        phases.append(phase)
    return phases


def while_saving(seconds: float, let_pass: int = 0) -> Callable[[Child], object]:
    def wait(child: Child) -> None:
        for _ in range(let_pass):
            child.wait_for("saving")
            child.wait_for("training")
        if child.wait_for("saving"):
            time.sleep(seconds)

    return wait


def while_training(seconds: float) -> Callable[[Child], object]:
    return lambda child: child.wait_for("training") and time.sleep(seconds)


def test_five_kills_change_nothing(run_config: RunConfig, undisturbed: Path, tmp_path: Path) -> None:
    config = run_config(tmp_path, "resume=auto")
    moments = [while_saving(0.0), while_training(0.05), while_saving(0.002), while_training(0.1), while_saving(0.004)]
    phases = kill_and_go_on(config, tmp_path / "out", iter(moments))
    assert len(phases) == 5 and phases.count("saving") >= 1, phases
    run_instruct(config)
    assert_the_same_run(tmp_path / "SlimOrca-ACT/run", undisturbed)


def test_a_curriculum_killed_in_its_second_stage_goes_on_bit_for_bit(
    tiny_config: Callable[..., PretrainInstructConfig], short_run_data: Path, tmp_path: Path
) -> None:
    """SlimOrca, then OpenOrca, on stand-ins of both."""
    rows = [json.loads(line) for line in (short_run_data / "rows.jsonl").read_text().splitlines()]
    (tmp_path / "slim").mkdir()
    (tmp_path / "slim/SlimOrca.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:24]))
    asked = [f"What is {n} plus {n}?" for n in range(40)]
    table = pa.table({"id": asked, "system_prompt": [""] * 40, "question": asked, "response": [f"{n + n}." for n in range(40)]})
    (tmp_path / "open").mkdir()
    pq.write_table(table.slice(0, 25), tmp_path / "open/1M-GPT4-Augmented.parquet")
    pq.write_table(table.slice(25), tmp_path / "open/3_5M-GPT3_5-Augmented.parquet")

    def config(folder: str) -> PretrainInstructConfig:
        places = [f"sources.{name}.data_dir={tmp_path / name[:4]}" for name in ("slimorca", "openorca")]
        places += [f"dataset.tokenizer_path={short_run_data / 'tokenizer.model'}", f"checkpoint_dir={tmp_path / folder}"]
        return tiny_config(*SHORT_RUN, "experiment=slimorca_then_openorca", "epochs=1", *places, "resume=auto")

    whole = run_instruct(config("whole")).checkpoint.parent
    run = tmp_path / "killed/SlimOrca-ACT/run"

    def admitted() -> int:
        saved = [json.loads((folder / "trainer/state.json").read_text()) for folder in checkpoints_of(run)[-1:]]
        return max((state["admitted"] for state in saved), default=0)

    with Child(config("killed"), tmp_path / "out") as child:
        # Of SlimOrca's stand-in there are 24 rows at most.
        while admitted() <= 24:
            assert child.phase != "finished"
            time.sleep(0.001)
        assert child.kill() != "finished"
    run_instruct(config("killed"))
    assert_the_same_run(run, whole)


@pytest.mark.slow
def test_fifty_kills_at_random_moments_change_nothing(run_config: RunConfig, undisturbed: Path, tmp_path: Path) -> None:
    """Each run is killed until it is through and compared; then another begins, until fifty kills have been survived."""
    seed = random.randrange(2**32)
    rng = random.Random(seed)

    def moments() -> Iterator[Callable[[Child], object]]:
        while True:
            yield (
                while_saving(rng.uniform(0, 0.02), rng.randrange(4)) if rng.random() < 0.5 else while_training(rng.uniform(0, 0.5))
            )

    phases: list[str] = []
    runs = 0
    while len(phases) < 50:
        runs += 1
        config = run_config(tmp_path / str(runs), "resume=auto")
        phases += kill_and_go_on(config, tmp_path / "out", itertools.islice(moments(), 50 - len(phases)))
        run_instruct(config)
        assert_the_same_run(tmp_path / str(runs) / "SlimOrca-ACT/run", undisturbed)
    print(f"seed {seed}, {runs} runs, killed while {Counter(phases)}")
    assert phases.count("saving") >= 10


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="mounting a small tmpfs takes root")
def test_a_full_disk_is_told_and_the_run_goes_on_once_there_is_room(
    run_config: RunConfig, undisturbed: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(path.stat().st_size for path in checkpoints_of(undisturbed)[0].rglob("*") if path.is_file())
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={3 * size}", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("tmpfs can't be mounted here")
    try:
        config = run_config(disk, "resume=auto")
        with pytest.raises(UsageError, match=r"can't be written: .*free space or choose another checkpoint_dir"):
            run_instruct(config)
        run = disk / "SlimOrca-ACT/run"
        assert checkpoints_of(run) and not list(run.glob(".step_*"))
        subprocess.run(["mount", "-o", f"remount,size={40 * size}", disk], check=True)
        run_instruct(config)
        assert_the_same_run(run, undisturbed)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_folder_that_cannot_be_written_is_told(run_config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "SlimOrca-ACT").write_text("a file where the run's folder should be")
    with pytest.raises(UsageError, match=r"the run's folder .* can't be written"):
        run_instruct(run_config(tmp_path))

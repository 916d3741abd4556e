"""Sweeps (-m) at the training entry scripts: a folder for each job, a failed one ends no other, the status tells, Optuna minimizes.

Jobs run in this process, but for those of other launchers.
"""

import errno
import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import training.instruct_run
from config.errors import StoppedBySignal
from config.schema import PretrainInstructConfig
from dataset.build_sample_dataset import build
from dataset.text.tokenizer import TOKENIZER_VARIABLE, Tokenizer
from tests.puzzle_data import write_puzzles
from tests.test_entry_scripts import SMALL, Outcome, run_script
from training.loop import RunResult

Sweep = Callable[..., Outcome]


@pytest.fixture(scope="module")
def prepared(tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer and data."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "tokenizer.model").write_bytes(tiny_tokenizer.model_bytes)
    build(folder / "sample", train_size=16, test_per_family=1)
    return folder


@pytest.fixture
def sweep(prepared: Path, tmp_path: Path) -> Sweep:
    """`sweep("lr=1e-3,1e-2", ...)`: the training script with -m, in an empty folder."""

    def call(*overrides: str) -> Outcome:
        data = (f"dataset.data_dir={prepared}/sample", "dataset=sample", "dataset.seq_len=64", "dataset.processes=1")
        settings = (*SMALL, *data, "global_batch_size=8", "sample_answers=0", "wandb=disabled")
        given = {TOKENIZER_VARIABLE: str(prepared / "tokenizer.model")}
        return run_script("pretrain_instruct.py", "-m", *settings, *overrides, folder=tmp_path, **given)

    return call


def jobs_of(folder: Path) -> list[dict[str, Any]]:
    """What the only sweep in `folder` has kept of its jobs, in their order."""
    jobs = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("checkpoints/*/sweeps/*/job_*.json")]
    return sorted(jobs, key=lambda job: job["job"])


def held_out_loss(run: Path) -> float:
    """As the last checkpoint of `run` has it."""
    *_, last = sorted(run.glob("step_*"), key=lambda path: int(path.name.removeprefix("step_")))
    loss: float = json.loads((last / "train_metrics.json").read_text(encoding="utf-8"))["test"]["loss_per_token"]
    return loss


def test_of_four_jobs_one_fails_and_the_others_train(sweep: Sweep, tmp_path: Path) -> None:
    outcome = sweep("lr=1e-3,-1,1e-2,1e-1", "run_name=007")
    assert outcome.status == 2 and "Traceback" not in outcome.err + outcome.out
    assert "error: job 1: " in outcome.err and "lr: Input should be greater than 0 (found -1)" in outcome.err
    assert outcome.err.endswith("error: 1 of 4 jobs failed: job 1 lr=-1\n")
    runs = tmp_path / "checkpoints/SlimOrca-ACT"
    assert {path.name for path in runs.iterdir()} == {"007-0", "007-2", "007-3", "sweeps"}
    jobs = jobs_of(tmp_path)
    assert [job.get("loss") for job in jobs] == [
        held_out_loss(runs / "007-0"),
        None,
        held_out_loss(runs / "007-2"),
        held_out_loss(runs / "007-3"),
    ]
    assert len({job["loss"] for job in jobs if "loss" in job}) == 3
    for number in (0, 2, 3):
        assert f"held-out loss {jobs[number]['loss']:.4f}, checkpoints/SlimOrca-ACT/007-{number}\n" in outcome.out
    assert "job 1 lr=-1: failed, not begun\n" in outcome.out
    # Nothing beside the runs and the sweep's own folder.
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
    [kept] = (runs / "sweeps").iterdir()
    assert {path.name for path in kept.iterdir()} == {"multirun.yaml", *(f"job_{number}.json" for number in range(4))}


def test_optuna_minimizes_the_held_out_loss_over_lr(sweep: Sweep, tmp_path: Path) -> None:
    outcome = sweep("hydra/sweeper=optuna", "hydra.sweeper.n_trials=5", "hydra.sweeper.n_jobs=1", "lr=interval(1e-4,1e-1)")
    assert outcome.status == 0, outcome.err
    jobs = jobs_of(tmp_path)
    assert len({job["run"] for job in jobs}) == 5
    for job in jobs:
        assert job["loss"] == held_out_loss(tmp_path / job["run"])
    [found] = tmp_path.glob("checkpoints/*/sweeps/*/optimization_results.yaml")
    best = min(jobs, key=lambda job: job["loss"])
    results = yaml.safe_load(found.read_text(encoding="utf-8"))
    assert results["best_value"] == best["loss"] and f"lr={results['best_params']['lr']}" in best["overrides"]


def test_optuna_goes_on_after_a_failed_trial(sweep: Sweep, tmp_path: Path) -> None:
    outcome = sweep(
        "hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", "hydra.sweeper.n_trials=3", "lr=choice(-1,1e-2)", "seed=null"
    )
    assert outcome.status == 2 and "error: 2 of 2 jobs failed" in outcome.err, "seed=null fits no job"
    outcome = sweep(
        "hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", "hydra.sweeper.n_jobs=1", "lr=choice(-1,1e-2)", "run_name=x"
    )
    assert outcome.status == 2 and "error: 1 of 2 jobs failed: job" in outcome.err
    assert "[HYDRA] Best parameters: {'lr': 0.01}" in outcome.out


@pytest.mark.parametrize("without", ["dry_run=true", "dataset=jsonl dataset.files=train.jsonl dataset.test_ratio=0"])
def test_optuna_is_told_that_there_is_no_loss(sweep: Sweep, without: str) -> None:
    outcome = sweep("hydra/sweeper=optuna", "hydra.sweeper.n_trials=1", "lr=choice(1e-2,1e-3)", *without.split())
    assert outcome.status == 2 and "the run has measured no held-out loss to optimize" in outcome.err


def test_any_fault_of_a_job_is_shown_and_ends_no_other(sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(config: PretrainInstructConfig) -> None:
        if config.seed == 0:
            raise ZeroDivisionError("a bug")

    monkeypatch.setattr(training.instruct_run, "run_instruct", run)
    outcome = sweep("seed=0,1", "hydra.sweeper.max_batch_size=1")
    assert outcome.status == 2 and "Traceback" in outcome.err and "error: 1 of 2 jobs failed: job 0 seed=0" in outcome.err
    assert [job.get("error") for job in jobs_of(tmp_path)] == ["ZeroDivisionError: a bug", None]


def test_a_full_disk_and_a_loss_that_is_no_number_are_failures_of_their_job(
    sweep: Sweep, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(config: PretrainInstructConfig) -> RunResult:
        if config.seed == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return RunResult(prepared, math.nan)

    monkeypatch.setattr(training.instruct_run, "run_instruct", run)
    outcome = sweep("seed=0,1", "hydra/sweeper=optuna", "hydra/sweeper/sampler=grid")
    assert outcome.status == 2 and "Traceback" not in outcome.err + outcome.out
    full, no_number = sorted(job["error"] for job in jobs_of(tmp_path))
    assert full == "No space left on device: the disk is full: free some space"
    assert no_number == "the held-out loss is nan: lower lr, or set grad_clip"


@pytest.mark.parametrize(("stop", "status"), [(KeyboardInterrupt(), 130), (StoppedBySignal(signal.SIGTERM), 143)])
def test_a_signal_ends_the_sweep(sweep: Sweep, monkeypatch: pytest.MonkeyPatch, stop: BaseException, status: int) -> None:
    begun = []

    def run(config: PretrainInstructConfig) -> None:
        begun.append(config.seed)
        raise stop

    monkeypatch.setattr(training.instruct_run, "run_instruct", run)
    assert sweep("seed=0,1").status == status
    assert begun == [0]


def test_unnamed_jobs_have_folders_of_their_own_and_one_sweep(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[PretrainInstructConfig] = []
    monkeypatch.setattr(training.instruct_run, "run_instruct", trained.append)
    # The keys that the sweep's folder is named after may differ between its jobs.
    assert sweep("project_name=007,1e5,a", "checkpoint_dir=~/runs").status == 0
    assert [config.project_name for config in trained] == ["007", "1e5", "a"]
    assert len({config.run_name for config in trained}) == 3
    [folder] = (Path.home() / "runs").glob("*/sweeps/*")
    assert len(list(folder.glob("job_*.json"))) == 3 and {config.checkpoint_dir for config in trained} == {
        str(Path.home() / "runs")
    }
    # A run that is named to go on from is not renamed.
    assert sweep("resume=some/run", "seed=1,2", "run_name=run").status == 0
    assert {config.run_name for config in trained[3:]} == {"run"}


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


def test_a_sweep_begun_again_goes_on_with_what_is_missing(sweep: Sweep, tmp_path: Path) -> None:
    assert sweep("run_name=x", "seed=0").status == 0
    outcome = sweep("run_name=x", "seed=0,1", "resume=auto")
    assert outcome.status == 0, outcome.err
    assert "resuming from checkpoints/SlimOrca-ACT/x-0/step_" in outcome.out
    again, new = jobs_of(tmp_path)[-2:]
    assert held_out_loss(tmp_path / "checkpoints/SlimOrca-ACT/x-0") == again["loss"] != new["loss"]
    assert "x-0 has checkpoints already" in sweep("run_name=x", "seed=0").err


def test_ranks_are_refused(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    outcome = sweep("seed=0,1")
    assert outcome.status == 2 and "ranks can't share a sweep" in outcome.err


def test_a_choice_that_no_job_could_begin_with_is_told_before_any_does(sweep: Sweep, tmp_path: Path) -> None:
    outcome = sweep("arch=trm,trn")
    assert outcome.status == 2 and outcome.err.startswith("error: arch=trn: no file") and "did you mean trm?" in outcome.err
    assert not list(tmp_path.glob("checkpoints/*/trm*"))


def test_puzzles_are_swept_too(tmp_path: Path) -> None:
    write_puzzles(tmp_path / "toy")
    small = ("arch.hidden_size=16", "arch.num_heads=2", "arch.H_cycles=1", "arch.L_cycles=1", "arch.puzzle_emb_ndim=16")
    run = ("data_paths=toy", "evaluators=[]", "epochs=1", "eval_interval=1", "global_batch_size=4", "device=cpu", "plot=false")
    outcome = run_script("pretrain.py", "-m", *small, *run, "wandb=disabled", "lr=1e-3,0", folder=tmp_path)
    assert outcome.status == 2 and "error: 1 of 2 jobs failed: job 1 lr=0" in outcome.err
    [loss, none] = [job.get("loss") for job in jobs_of(tmp_path)]
    assert loss > 0 and none is None


@pytest.mark.parametrize("launcher", ["joblib", pytest.param("submitit_local", marks=pytest.mark.slow)])
def test_other_launchers_run_the_jobs_in_processes_of_their_own(sweep: Sweep, tmp_path: Path, launcher: str) -> None:
    outcome = sweep(f"hydra/launcher={launcher}", "lr=1e-3,-1", "run_name=x")
    assert outcome.status == 2 and "error: 1 of 2 jobs failed: job 1 lr=-1" in outcome.err
    assert jobs_of(tmp_path)[0]["loss"] == held_out_loss(tmp_path / "checkpoints/SlimOrca-ACT/x-0")

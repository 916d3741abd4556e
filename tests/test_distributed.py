"""Several ranks give what one process gives: weights, measures, checkpoints (contract 9). None of them hangs."""

import datetime
import json
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import TCPStore

from artifacts.checkpoint import checkpoints_of, step_of
from config.compose import compose_as
from config.errors import UsageError
from config.schema import PretrainInstructConfig, PretrainPuzzleConfig
from models.distributed import Ranks, _unused_part, joined_ranks
from tests.children import start_ranks
from tests.conftest import SHORT_RUN, TINY
from tests.puzzle_data import TINY_PUZZLES, write_puzzles
from tests.torchrun import run_two_ranks
from training.instruct_run import run_instruct
from training.puzzle_run import run_puzzles

RunConfig = Callable[..., PretrainInstructConfig]
# Five rows for two ranks, gradient through both ACT steps of two level calls; in float64, where no rounding decides an update.
EXACT = ("arch.forward_dtype=float64", "global_batch_size=5", "arch.grad_calls=4", "grad_clip=0.5", "epochs=2")


@pytest.fixture(scope="module")
def alone(run_config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    return run_instruct(run_config(tmp_path_factory.mktemp("alone"), *EXACT)).checkpoint.parent


@pytest.fixture(scope="module")
def together(run_config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by two ranks."""
    folder = tmp_path_factory.mktemp("together")
    children = start_ranks(run_config(folder, *EXACT), 2, folder)
    assert [child.end(240) for child in children] == [0, 0], "\n".join(child.text for child in children)
    assert "2 ranks" in children[0].text and children[1].text == "", "the first rank speaks, the others don't"
    return folder / "SlimOrca-ACT/run"


def assert_equal(run: Path, other: Path) -> None:
    """The same steps, and weights, optimizer and measures within the rounding of sums in another order."""
    assert [step_of(folder) for folder in checkpoints_of(run)] == [step_of(folder) for folder in checkpoints_of(other)]
    for folder, like in zip(checkpoints_of(run), checkpoints_of(other), strict=True):
        for name in ("model", "ema", "trainer/tensors"):
            found, expected = load_file(folder / f"{name}.safetensors"), load_file(like / f"{name}.safetensors")
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")
    lines, expected_lines = ([json.loads(line) for line in (r / "metrics.jsonl").read_text().splitlines()] for r in (run, other))
    assert len(lines) == len(expected_lines)
    for line, expected_line in zip(lines, expected_lines, strict=True):
        assert flat(line) == pytest.approx(flat(expected_line), rel=1e-6)


def flat(value: object, name: str = "") -> dict[str, object]:
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for part, content in pairs for key, leaf in flat(content, f"{name}.{part}").items()}
    return {name: value}


def test_two_ranks_are_one(together: Path, alone: Path) -> None:
    assert len(checkpoints_of(alone)) > 4
    assert_equal(together, alone)


def test_two_ranks_are_one_under_muon(run_config: RunConfig, tmp_path: Path) -> None:
    """But for bfloat16, in which Muon computes: a sum in another order may round to its neighbour."""
    muon = (*EXACT, "optimizer=muon", "muon_lr=0.1", "max_steps=3", "checkpoint.every_steps=1")
    alone = run_instruct(run_config(tmp_path / "alone", *muon)).checkpoint
    children = start_ranks(run_config(tmp_path, *muon), 2, tmp_path)
    assert [child.end(240) for child in children] == [0, 0], "\n".join(child.text for child in children)
    for step in (1, 2, 3):
        found, expected = (load_file(f / f"step_{step}/model.safetensors") for f in (tmp_path / "SlimOrca-ACT/run", alone.parent))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-3 * step, msg=lambda m, n=name: f"{n}: {m}")


def test_two_ranks_end_together_and_go_on(run_config: RunConfig, tmp_path: Path) -> None:
    """By the clock, which is the first one's, then by the held-out loss: in all the run of one process that knows no clock."""
    watched = (*EXACT, "eval_every_steps=3", "eval_interval=2", "early_stopping.patience=2", "early_stopping.min_delta=100")
    alone = run_instruct(run_config(tmp_path / "alone", *watched)).checkpoint
    assert step_of(alone) == 9
    run = tmp_path / "SlimOrca-ACT/run"
    for limit, ended in (("max_minutes=1e-9", "at step 1: max_minutes"), ("max_minutes=60", "at step 9: 2 evaluations in a row")):
        children = start_ranks(run_config(tmp_path, *watched, limit, "resume=auto"), 2, tmp_path)
        assert [child.end(240) for child in children] == [0, 0], "\n".join(child.text for child in children)
        assert ended in children[0].text and children[1].text == ""
    shutil.rmtree(run / "step_1")
    assert_equal(run, alone.parent)


def test_two_ranks_are_one_on_puzzles(tmp_path: Path) -> None:
    path = write_puzzles(tmp_path / "puzzles")
    one, two = (
        compose_as(
            PretrainPuzzleConfig, "cfg_pretrain", [f"data_paths=[{path}]", f"checkpoint_dir={tmp_path}", *TINY_PUZZLES, *own]
        )
        for own in (["run_name=one", "ema=true"], ["run_name=two", "ema=true"])
    )
    alone = run_puzzles(one).checkpoint.parent
    children = start_ranks(two, 2, tmp_path)
    assert [child.end(240) for child in children] == [0, 0], "\n".join(child.text for child in children)
    assert len(checkpoints_of(alone)) == 2
    assert_equal(alone.parent / "two", alone)


def test_a_run_goes_on_with_another_number_of_ranks(together: Path, alone: Path, run_config: RunConfig, tmp_path: Path) -> None:
    run = tmp_path / "SlimOrca-ACT/run"
    shutil.copytree(together, run)
    for folder in checkpoints_of(run)[2:]:
        shutil.rmtree(folder)
    run_instruct(run_config(tmp_path, *EXACT, "resume=auto"))
    assert_equal(run, alone)


def test_a_rank_that_dies_ends_the_others(run_config: RunConfig, tmp_path: Path) -> None:
    first, second = start_ranks(run_config(tmp_path, *EXACT, "epochs=1000"), 2, tmp_path)
    with first, second:
        assert second.wait_for("training"), second.text
        second.send(signal.SIGKILL)
        died = time.monotonic()
        assert first.end(60) == 2
        assert time.monotonic() - died < 60
        assert "rank 0 has lost another rank" in first.text and "resume=auto" in first.text and "Traceback" not in first.text


def test_a_rank_that_hangs_is_given_up_after_the_timeout(run_config: RunConfig, tmp_path: Path) -> None:
    first, second = start_ranks(run_config(tmp_path, *EXACT, "epochs=1000", "dist_timeout_minutes=0.2"), 2, tmp_path)
    with first, second:
        assert second.wait_for("training"), second.text
        second.send(signal.SIGSTOP)
        assert first.end(60) == 2
        assert "rank 0 has lost another rank" in first.text


def test_a_signal_to_one_rank_stops_all_of_them_after_the_same_step(run_config: RunConfig, tmp_path: Path) -> None:
    children = start_ranks(run_config(tmp_path, *EXACT, "epochs=1000", "checkpoint.every_steps=null"), 2, tmp_path)
    with children[0], children[1]:
        assert children[1].wait_for("training"), children[1].text
        children[1].send(signal.SIGTERM)
        assert [child.end(120) for child in children] == [143, 143]
    assert "SIGTERM: saved" in children[0].text and children[1].text == ""
    assert len(checkpoints_of(tmp_path / "SlimOrca-ACT/run")) >= 1


# The script, with a second rank that dies in its seventh step as if of a power failure, when it is started for the first time.
DYING = """
import os, runpy, signal
from training.loop import Trainer

step = Trainer.step


def dying(trainer):
    if trainer.progress.step == 6 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return step(trainer)


Trainer.step = dying
runpy.run_path("pretrain_instruct.py", run_name="__main__")
"""


def test_torchrun_starts_the_ranks_again_and_they_go_on(alone: Path, short_run_data: Path, tmp_path: Path) -> None:
    """Packed, too: of which rows share a row of attention nothing may depend."""
    (tmp_path / "dying.py").write_text(DYING)
    places = (f"dataset.data_dir={short_run_data}", f"dataset.tokenizer_path={short_run_data / 'tokenizer.model'}")
    settings = (*TINY, *SHORT_RUN, *EXACT, *places, f"checkpoint_dir={tmp_path}", "packing=packed", "resume=auto")
    said = run_two_ranks(tmp_path / "dying.py", settings)
    run = tmp_path / "SlimOrca-ACT/run"
    assert "rank 0 has lost another rank" in said and f"resuming from {run / 'step_4'}" in said
    assert_equal(run, alone)


def test_ranks_started_again_meet_where_nothing_is_left_of_those_before() -> None:
    """torchrun's store stays; a rank may be started while another is late, or die before all have met."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def meet(rank: int, seconds: float = 30) -> Store:
        client = TCPStore("127.0.0.1", server.port, is_master=False)
        return _unused_part(client, rank, 3, datetime.timedelta(seconds=seconds))

    with ThreadPoolExecutor(3) as threads:
        with pytest.raises(RuntimeError, match=r"ranks \[2\] haven't connected"):
            given_up = threads.submit(meet, 1)
            meet(0, seconds=0.5)
        assert not given_up.result().check(["address"])
        for start in range(3):
            early = [threads.submit(meet, rank) for rank in (0, 1)]
            time.sleep(0.2)
            assert not early[0].done(), "rank 0 took an old rank 2 for the new one"
            parts = [threads.submit(meet, 2).result(), *(meeting.result() for meeting in early)]
            assert not any(part.check(["address"]) for part in parts)
            parts[start].set("address", str(start))
            assert [part.get("address") for part in parts] == [str(start).encode()] * 3


def test_one_process_gives_back_what_it_is_given() -> None:
    ranks, rows = Ranks(), torch.arange(6).view(3, 2)
    ranks.sum_([rows])
    assert torch.equal(rows, torch.arange(6).view(3, 2))
    assert ranks.gather({"a": 7}) == ranks.gather_at_first({"a": 7}) == [{"a": 7}]
    assert ranks.agree({"a": [1]}) == {"a": [1]} and ranks.sum_numbers([0.5, 2]) == [0.5, 2.0]
    with joined_ranks("cpu", 1.0) as alone:
        assert alone == ranks and alone.is_first


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
def test_parts_are_contiguous_and_nearly_equal(size: int) -> None:
    parts = [Ranks(rank, size).part(7) for rank in range(size)]
    assert [slot for part in parts for slot in part] == list(range(7))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_ranks_without_a_launcher_or_without_rows_are_told(
    run_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UsageError, match=r"WORLD_SIZE is 2, but the ranks can't connect: .*start all of them with torchrun"):
        run_instruct(run_config(tmp_path))

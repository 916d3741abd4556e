"""The scripts of the puzzle work as a person meets them: the original's commands, whole runs, wrong input told in one message."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from config.compose import compose_as, plain_overrides
from config.schema import PretrainPuzzleConfig
from dataset.build_arc_dataset import build
from dataset.build_small_puzzles import build_sudoku
from tests.puzzle_data import TINY_PUZZLES, write_puzzles
from tests.test_build_arc_dataset import write_subset
from tests.test_entry_scripts import assert_told, run_script, run_well

# float32, the format that weights are kept in, or a checkpoint would round them.
RUN = (*(text for text in TINY_PUZZLES if not text.startswith("arch.forward_dtype")), "arch.forward_dtype=float32")
RUN_FOLDER = "checkpoints/TRM-puzzles"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/toy and a run `a` on it."""
    folder = tmp_path_factory.mktemp("scripts")
    write_puzzles(folder / "data/toy")
    run_well("pretrain.py", "data_paths=[data/toy]", *RUN, "+run_name=a", "ema=True", "eval_save_outputs=[preds]", folder=folder)
    return folder


def checkpoints(folder: Path, run: str) -> list[Path]:
    return sorted((folder / RUN_FOLDER / run).glob("step_*"), key=lambda path: int(path.name[5:]))


def measured(folder: Path, checkpoint: Path, *arguments: str) -> dict[str, Any]:
    out = folder / "measured"
    run_well("inference.py", "--checkpoint", str(checkpoint), "--output-dir", str(out), *arguments, folder=folder)
    metrics: dict[str, Any] = json.loads((out / "metrics_test.json").read_text())
    return metrics


def test_the_originals_command_line_is_understood() -> None:
    command = [
        "arch=trm",
        "data_paths=[data/arc1concept-aug-1000]",
        "arch.L_layers=2",
        "arch.H_cycles=3",
        "arch.L_cycles=4",
        "+run_name=pretrain_att_arc1concept_4",
        "ema=True",
    ]
    config = compose_as(PretrainPuzzleConfig, "cfg_pretrain", command)
    assert (config.run_name, config.arch.L_cycles, config.ema) == ("pretrain_att_arc1concept_4", 4, True)
    assert (config.global_batch_size, config.epochs, config.eval_interval, config.lr, config.lr_min_ratio) == (
        768, 100_000, 10_000, 1e-4, 1.0,
    )  # fmt: skip
    assert (config.lr_warmup_steps, config.weight_decay, config.beta1, config.beta2) == (2000, 0.1, 0.9, 0.95)
    assert (config.puzzle_emb_lr, config.puzzle_emb_weight_decay, config.ema_rate) == (1e-2, 0.1, 0.999)
    assert [evaluator.name for evaluator in config.evaluators] == ["arc@ARC"]
    # Only a needless plus goes: of a key that isn't there, and of one forced, Hydra and the schema speak.
    assert plain_overrides(["+lrr=1", "++lr=2", "+lr=2", "~ema"], PretrainPuzzleConfig) == [
        "+lrr=1",
        "++lr=2",
        "lr=2",
        "~ema",
    ]


def test_the_originals_names_of_classes_and_losses_are_understood() -> None:
    command = [
        "arch.name=recursive_reasoning.trm_singlez@TinyRecursiveReasoningModel_ACTV1",
        "arch.loss.loss_type=softmax_cross_entropy",
        "eval_interval=null",
        "+min_eval_interval=3",
    ]
    config = compose_as(PretrainPuzzleConfig, "cfg_pretrain", command)
    assert (config.arch.name, config.arch.loss, config.min_eval_interval) == ("trm_singlez", "softmax", 3)
    assert config.eval_interval == config.epochs == 100_000
    sweep = plain_overrides(
        ["arch.loss.loss_type=stablemax_cross_entropy,softmax_cross_entropy"], PretrainPuzzleConfig, is_sweep=True
    )
    assert sweep == ["arch.loss=stablemax,softmax"]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sudoku_mlp", {"L_cycles": 6, "mlp_t": True, "pos_encodings": "none"}),
        ("sudoku_attention", {"L_cycles": 6, "mlp_t": False, "pos_encodings": "rope"}),
        ("maze", {"L_cycles": 4, "mlp_t": False}),
        ("arc1", {"L_cycles": 4}),
        ("arc2", {"L_cycles": 4}),
    ],
)
def test_the_papers_experiments_are_presets(name: str, settings: dict[str, Any]) -> None:
    config = compose_as(PretrainPuzzleConfig, "cfg_pretrain", [f"experiment={name}"])
    expected = {"H_cycles": 3, "L_layers": 2, "halt_max_steps": 16, "hidden_size": 512, "halt_exploration_prob": 0.1, **settings}
    assert {key: getattr(config.arch, key) for key in expected} == expected
    is_arc = name.startswith("arc")
    decay, epochs, vectors_lr = (0.1, 100_000, 1e-2) if is_arc else (1.0, 50_000, 1e-4)
    assert (config.weight_decay, config.puzzle_emb_weight_decay, config.epochs, config.puzzle_emb_lr) == (
        decay, decay, epochs, vectors_lr,
    )  # fmt: skip
    assert config.ema and config.global_batch_size == 768 and bool(config.evaluators) == is_arc


def test_a_run_leaves_whole_checkpoints(trained: Path) -> None:
    kept = checkpoints(trained, "a")
    assert len(kept) == 2
    for name in ("model.safetensors", "ema.safetensors", "config.yaml", "dataset.json", "checkpoint.json", "train_metrics.json"):
        assert (kept[-1] / name).is_file(), name
    assert not (kept[-1] / "tokenizer.model").exists()
    metrics = json.loads((kept[-1] / "train_metrics.json").read_text())["test"]
    assert {"accuracy", "exact_accuracy", "q_halt_accuracy", "steps", "lm_loss", "q_halt_loss"} < metrics.keys()
    assert len(metrics["exact_accuracy_by_act_step"]) == 3 and metrics["steps"] == 3
    lines = [json.loads(line) for line in (kept[-1].parent / "metrics.jsonl").read_text().splitlines()]
    assert [line["test"] for line in lines if "test" in line][-1] == metrics
    saved = load_file(kept[-1].parent / f"outputs_test_{kept[-1].name}.safetensors")
    assert saved.keys() == {"rows", "preds"} and len(saved["preds"]) == metrics["rows"]


def test_inference_gives_the_figures_of_training(trained: Path) -> None:
    for checkpoint in checkpoints(trained, "a"):
        expected = json.loads((checkpoint / "train_metrics.json").read_text())["test"]
        metrics = measured(trained, checkpoint)
        assert {key: metrics[key] for key in expected} == expected


def test_flags_of_inference(trained: Path) -> None:
    checkpoint = checkpoints(trained, "a")[-1]
    few = measured(trained, checkpoint, "--batch-size", "2", "--max-batches", "1", "--save-outputs", "preds", "preds_by_step")
    assert few["rows"] == 2
    assert load_file(trained / "measured/outputs_test.safetensors")["preds_by_step"].shape == (2, 3, 6)
    halting = measured(trained, checkpoint, "--overrides", "arch.act_inference=true", "arch.halt_max_steps=4")
    assert len(halting["exact_accuracy_by_act_step"]) == 4
    run_well("inference.py", "--checkpoint", str(checkpoint), "--split", "train", "--data-dir", "data/toy", folder=trained)
    own = json.loads((checkpoint / "metrics_train.json").read_text())
    # Other paths to test on are none to train on.
    other = ("--overrides", "data_paths_test=[data/elsewhere]")
    run_well("inference.py", "--checkpoint", str(checkpoint), "--split", "train", *other, folder=trained)
    assert json.loads((checkpoint / "metrics_train.json").read_text()) == own and own["rows"] > few["rows"]
    assert own["data_paths"] == ["data/toy"]


def test_a_run_begins_with_the_originals_weights(trained: Path) -> None:
    """A pickled state dict under the compiled model's names; other puzzles get the mean vector."""
    weights = load_file(checkpoints(trained, "a")[-1] / "model.safetensors")
    torch.save({f"_orig_mod.{name}": value for name, value in weights.items()}, trained / "step_100")
    write_puzzles(trained / "data/more", train=20)
    frozen = ("freeze_weights=true", "puzzle_emb_lr=0", "run_name=b", "epochs=2", "load_checkpoint=step_100")
    outcome = run_well("pretrain.py", "data_paths=[data/more]", *RUN, *frozen, folder=trained)
    assert "starting from the weights of step_100" in outcome.out
    folder = ("run_name=d", "epochs=2", f"load_checkpoint={RUN_FOLDER}/a", "arch.rope_theta=500")
    outcome_of_folder = run_well("pretrain.py", "data_paths=[data/more]", *RUN, *folder, folder=trained)
    assert f"using its newest checkpoint, {checkpoints(trained, 'a')[-1].name}" in outcome_of_folder.out
    assert "other setting: arch.rope_theta was 10000.0, now 500.0" in outcome_of_folder.out
    found = load_file(checkpoints(trained, "b")[-1] / "model.safetensors")
    vectors = weights.pop("model.inner.puzzle_emb.weights")
    reset = found.pop("model.inner.puzzle_emb.weights")
    assert len(reset) == 21 and torch.equal(reset, vectors.mean(dim=0, keepdim=True).expand(21, -1))
    assert all(torch.equal(found[name], value) for name, value in weights.items())


def test_a_stopped_run_is_gone_on_with(trained: Path) -> None:
    """Its newest checkpoint taken away, as if it had been killed: the same weights come out again."""
    last = checkpoints(trained, "a")[-1]
    aside = last.rename(trained / "aside")
    run_well("pretrain.py", "data_paths=[data/toy]", *RUN, "run_name=a", "ema=True", "resume=auto", folder=trained)
    for name in ("model.safetensors", "ema.safetensors"):
        first, second = load_file(aside / name), load_file(last / name)
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_checkpoints_at_the_end_only(trained: Path) -> None:
    run_well("pretrain.py", "data_paths=[data/toy]", *RUN, "run_name=c", "checkpoint_every_eval=false", folder=trained)
    assert len(checkpoints(trained, "c")) == 1


def test_a_dry_run_says_what_the_run_would_take(trained: Path) -> None:
    outcome = run_well("pretrain.py", "data_paths=[data/toy]", *RUN, "run_name=dry", "dry_run=true", folder=trained)
    for said in ("parameters  ", "puzzle vectors  ", "memory  ", "optimizer steps  ", "FLOPs a token  ", "expected time  "):
        assert said in outcome.out
    assert not (trained / RUN_FOLDER / "dry").exists()


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["data_paths=[data/none]"], "data/none"),
        (["lrr=1"], "lrr: no such key, did you mean lr?"),
        (["checkpoint_path=runs"], "checkpoint_path: no such key here, the folder of a run is <checkpoint_dir>/"),
        (["min_eval_interval=-1"], "min_eval_interval: "),
        (["arch.loss.loss_type=hinge"], "arch.loss: "),
        (["arch.loss.name=losses@ACTLossHead"], "there is one loss head"),
        (["arch.rms_norm_eps=1e-6"], "fixed at the original's value, 1e-5"),
        (["arch.name=recursive_reasoning.rnn@Model"], "arch.name: "),
        (["arch.H_layers=2"], "H_layers 2 means nothing to trm: set it to 0"),
        (["eval_save_outputs=[logits]"], "eval_save_outputs.0: "),
        (["+lrr=1"], "lrr: no such key, did you mean lr?"),
        (["eval_interval=3"], "epochs 4 must be a multiple of eval_interval 3"),
        (["early_stopping.patience=2", "checkpoint_every_eval=false"], "set checkpoint_every_eval=true"),
        (["global_batch_size=4000"], "global_batch_size 4000"),
        (["arch.attention=causal"], "choose full"),
        (["arch.grad_calls=7"], "an optimizer step on puzzles takes one"),
        (["evaluators=[{name: arc@XYZ}]"], "evaluators.0.name"),
        (["evaluators=[{name: arc@ARC}]"], "test_puzzles.json"),
        (["freeze_weights=true", "arch.puzzle_emb_ndim=0", "arch.puzzle_emb_len=0"], "nothing to learn"),
        (["load_checkpoint=nowhere.pt"], "nowhere.pt"),
        (["data_paths_test=[data/longer]"], "expected seq_len 6"),
        (["data_paths_test=[data/fourteen]"], "data_paths_test: identifiers.json of data/fourteen numbers puzzles otherwise"),
        (["run_name=a"], "has checkpoints already"),
    ],
)
def test_wrong_settings_are_told(trained: Path, overrides: list[str], told: str) -> None:
    if "longer" in overrides[0] and not (trained / "data/longer").exists():
        write_puzzles(trained / "data/longer", tokens=8)
    if "fourteen" in overrides[0]:
        write_puzzles(trained / "data/fourteen", train=14)
    outcome = run_script("pretrain.py", "data_paths=[data/toy]", *RUN, *overrides, folder=trained)
    assert_told(outcome, told)
    assert not list((trained / RUN_FOLDER).glob("trm-*"))


def test_wrong_use_of_a_checkpoint_is_told(trained: Path) -> None:
    checkpoint = str(checkpoints(trained, "a")[-1])
    write_puzzles(trained / "data/others", train=14, seed=1)
    for arguments, told in (
        (["--checkpoint", "nowhere"], "no checkpoint at nowhere"),
        (["--checkpoint", checkpoint, "--data-paths", "data/others"], "num_puzzle_identifiers 13, found 15"),
        (["--checkpoint", checkpoint, "--max-batches", "0"], "--max-batches 0"),
        (["--checkpoint", checkpoint, "--overrides", "lrr=1"], "lrr: no such key"),
        (["--checkpoint", checkpoint, "--save-outputs", "nll"], "invalid choice"),
        (["--checkpoint", checkpoint, "--samples", "2"], "several samples differ by --noise"),
        (["--checkpoint", checkpoint, "--choose", "rules"], "expected ARC, a maze or Sudoku, found rows of 6 positions"),
        (["--checkpoint", checkpoint, "--puzzle", "any.txt"], "expected ARC, a maze or Sudoku, found rows of 6 positions"),
        (["--checkpoint", checkpoint, "--show"], "--show goes with --puzzle"),
        (["--checkpoint", checkpoint, "--puzzle", "any.txt", "--save-outputs", "preds"], "--puzzle writes nothing"),
    ):
        assert_told(run_script("inference.py", *arguments, folder=trained), told)
    outcome = run_script("generate_instruct.py", "--checkpoint", checkpoint, "--message", "hello", folder=trained)
    assert_told(outcome, "another kind of model: use inference.py")


def test_samples_are_chosen_among(trained: Path) -> None:
    checkpoint = checkpoints(trained, "a")[-1]
    plain = measured(trained, checkpoint)
    found = measured(trained, checkpoint, "--samples", "3", "--noise", "0.5", "--choose", "votes")
    assert (found["steps"], plain["steps"]) == (9, 3)
    assert found["search"] == {"samples": 3, "noise": 0.5, "symmetries": False, "choose": "votes", "seed": 0}
    assert found["oracle_accuracy"] >= max(found["exact_accuracy"], plain["exact_accuracy"])
    assert measured(trained, checkpoint, "--samples", "3", "--noise", "0.5", "--choose", "first")["steps"] <= 9


def test_a_sudoku_of_ones_own_is_answered(tmp_path: Path) -> None:
    build_sudoku(tmp_path / "data", train_size=20, test_size=4)
    run_well("pretrain.py", "data_paths=[data]", *RUN, "run_name=s", "arch.mlp_t=true", "arch.pos_encodings=none", folder=tmp_path)
    checkpoint = ("--checkpoint", str(tmp_path / RUN_FOLDER / "s"))
    question = "12...." + "." * 30
    (tmp_path / "one.txt").write_text(question)
    (tmp_path / "two.csv").write_text(f"question\n{question}\n{question}\n")
    shown = run_well("inference.py", *checkpoint, "--puzzle", "one.txt", "--show", folder=tmp_path).out
    assert shown.startswith("1 2 . . . .\n") and "\nACT step 3: " in shown and shown.endswith(": wrong by the rules of Sudoku\n")
    search = ("--samples", "4", "--symmetries", "--choose", "rules")
    told = run_well("inference.py", *checkpoint, "--puzzle", "two.csv", *search, folder=tmp_path).out
    assert "puzzle 2 of 2\n" in told and "of 4 samples: wrong" in told
    assert_told(run_script("inference.py", *checkpoint, "--puzzle", "nowhere.txt", folder=tmp_path), "nowhere.txt can't be read")
    (tmp_path / "one.txt").write_text("5" * 81)
    assert_told(run_script("inference.py", *checkpoint, "--puzzle", "one.txt", folder=tmp_path), "expected 36 characters")


def test_an_arc_task_of_ones_own_is_answered(tmp_path: Path) -> None:
    task = {"train": [{"input": [[1]], "output": [[2]]}], "test": [{"input": [[3, 4]], "output": [[4, 3]]}]}
    write_subset(tmp_path, "evaluation", {"x": task, "y": task})
    build(str(tmp_path / "arc"), tmp_path / "data", ["evaluation"], ["evaluation"], num_aug=2, processes=1)
    small = ("global_batch_size=2", "arch.halt_max_steps=1", "epochs=1", "eval_interval=1", "max_steps=1")
    run_well("pretrain.py", "data_paths=[data]", *RUN, *small, "run_name=arc", folder=tmp_path)
    for name in ("x", "z"):
        (tmp_path / f"{name}.json").write_text(json.dumps(task))
    checkpoint = ("--checkpoint", str(tmp_path / RUN_FOLDER / "arc"))
    told = run_well("inference.py", *checkpoint, "--puzzle", "x.json", folder=tmp_path).out
    assert told.startswith("test 1 of 1; ARC has no rules") and "of 3 votes" in told
    for arguments, expected in (
        (("--puzzle", "z.json"), "the model knows no puzzle 'z'"),
        (("--puzzle", "x.json", "--data-paths", "nowhere"), "nowhere"),
        (("--puzzle", "x.json", "--samples", "2", "--symmetries"), "--symmetries and --choose rules are for Sudoku and mazes"),
    ):
        assert_told(run_script("inference.py", *checkpoint, *arguments, folder=tmp_path), expected)


def test_puzzles_numbered_otherwise_are_told(trained: Path, tmp_path: Path) -> None:
    renamed = Path(write_puzzles(tmp_path / "renamed"))
    names = json.loads((renamed / "identifiers.json").read_text())
    (renamed / "identifiers.json").write_text(json.dumps([names[0], *names[:0:-1]]))
    checkpoint = str(checkpoints(trained, "a")[-1])
    outcome = run_script("inference.py", "--checkpoint", checkpoint, "--data-paths", str(renamed), folder=trained)
    assert_told(outcome, "numbers puzzles otherwise")


def test_the_saved_settings_are_the_runs(trained: Path) -> None:
    settings = yaml.safe_load((checkpoints(trained, "a")[-1] / "config.yaml").read_text())
    assert (settings["data_paths"], settings["run_name"], settings["ema"]) == (["data/toy"], "a", True)
    assert settings["arch"]["hidden_size"] == 16 and settings["lr"] == 1e-2

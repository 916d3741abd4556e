"""A checkpoint in transformers: the same logits, answers, ids and weights (artifacts/hf, scripts/export_hf.py)."""

import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

from artifacts.checkpoint import Checkpoint, Snapshot, TrainerState, open_checkpoint, save_checkpoint
from artifacts.halting import HaltingCalibration, write_halting_calibration
from artifacts.hf.export import export_folder, modeling_file
from artifacts.weights import read_weights
from config.errors import UsageError
from config.schema import PretrainInstructConfig
from dataset.text.conversation import Template, Turn, encode_conversation
from dataset.text.tokenizer import Tokenizer
from generation import load
from models.act import RecursiveModel
from training.instruct_run import run_instruct

RECURSIONS = ("looped", "trm", "trm_singlez", "trm_hier6", "hrm", "transformers_baseline")
PREFIX = ("arch.attention=prefix", "arch.qk_norm=true")
OTHERS = ("arch.norm=pre", "arch.loss=stablemax", "arch.tie_embeddings=true", "arch.pos_encodings=none")
MESSAGES = [
    {"role": "user", "content": "Red 1"},
    {"role": "assistant", "content": "blue"},
    {"role": "user", "content": "What is 2 plus 3"},
]

Trained = Callable[..., Checkpoint]


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_config: Callable[..., PretrainInstructConfig],
    tiny_model: Callable[..., RecursiveModel],
    tiny_tokenizer: Tokenizer,
) -> Trained:
    """`trained("arch=hrm", ...)`: an opened checkpoint of a tiny model with random weights."""

    def build(*overrides: str) -> Checkpoint:
        folder = tmp_path_factory.mktemp("run") / "step_7"
        given = ("dataset.seq_len=256", "generation.max_output_tokens=8", *overrides)
        model = tiny_model(*given, vocab_size=tiny_tokenizer.vocab_size, halt_scale=2.0)
        model.embed_tokens.embedding_weight.data *= 8  # or all questions would have the same answer
        save_checkpoint(
            folder,
            Snapshot(7, model.state_dict(), None, {"test": {"bits_per_byte": 1.25}}, TrainerState({}, {})),
            config=tiny_config(*given),
            tokenizer=tiny_tokenizer,
            template=Template(),
            data_hash="0123456789abcdef",
            data_report={"sources": {"hub": {"train": {"files": ["rows.jsonl"], "counts": {"read": 12}}}}},
        )
        return open_checkpoint(folder)

    return build


def exported(checkpoint: Checkpoint, dtype: torch.dtype = torch.float64) -> tuple[Any, Any, Path]:
    folder = checkpoint.folder.parent / f"exported_{len(list(checkpoint.folder.parent.iterdir()))}"
    export_folder(checkpoint, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype)
    return model.eval(), AutoTokenizer.from_pretrained(folder, trust_remote_code=True), folder


@torch.no_grad()
def our_logits(checkpoint: Checkpoint, ids: Any, segment: Any, dtype: str, act_steps: int, threshold: float | None) -> torch.Tensor:
    """[T, V]: logits of a softmax model, log p of a stablemax one."""
    model = load(checkpoint, device="cpu", dtype=dtype).model
    *_, last = model.refine_rows(
        torch.tensor(ids).long()[None], torch.tensor(segment)[None], act_steps=act_steps, halt_threshold=threshold
    )
    logits = model.logits(last.output_BTD[0])
    if model.config.loss == "stablemax":
        size = torch.where(logits >= 0, logits + 1, 1 / (1 - logits))
        return (size / size.sum(-1, keepdim=True)).log()
    return logits


@pytest.mark.parametrize("overrides", [(), PREFIX, OTHERS], ids=("plain", "prefix", "others"))
@pytest.mark.parametrize("recursion", RECURSIONS)
def test_logits_are_ours(trained: Trained, tiny_tokenizer: Tokenizer, recursion: str, overrides: tuple[str, ...]) -> None:
    checkpoint = trained(f"arch={recursion}", *overrides)
    model, _, _ = exported(checkpoint)
    turns = [Turn(message["role"], message["content"]) for message in MESSAGES]
    row = encode_conversation([*turns, Turn("assistant", "5")], tiny_tokenizer, Template())
    ids = torch.tensor(row.ids).long()[None]
    for act_steps, threshold in ((1, None), (4, None), (4, 0.4)):
        ours = our_logits(checkpoint, row.ids, row.segment, "float64", act_steps, threshold)
        with torch.no_grad():
            theirs = model(ids, act_steps=act_steps, halt_threshold=threshold).logits[0]
        assert (ours - theirs).abs().max() < 1e-9
    ours = our_logits(checkpoint, row.ids, row.segment, "float32", 1, None)
    with torch.no_grad():
        theirs = model.float()(ids, act_steps=1).logits[0]
    assert theirs.dtype == torch.float32 and (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize(
    "overrides", [("arch=trm",), ("arch=hrm", *PREFIX), ("arch=trm", *OTHERS)], ids=("plain", "prefix", "others")
)
def test_generate_gives_the_engines_tokens_of_a_padded_batch(trained: Trained, overrides: tuple[str, ...]) -> None:
    checkpoint = trained(*overrides, "arch.H_cycles=1", "generation.max_output_tokens=4")
    theirs, tokenizer, _ = exported(checkpoint)
    ours = load(checkpoint, device="cpu")
    words = ("Red", "blue 1", "What is", "17 plus 18", "gives 3.")
    questions = [" ".join(words[(i + j) % 5] for j in range(1 + i % 7)) for i in range(64)]
    chats = [[{"role": "user", "content": text}] for text in questions]
    inputs = tokenizer.apply_chat_template(chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt")
    assert len(set(inputs["attention_mask"].sum(1).tolist())) > 5
    for options in ({}, {"act_steps": 1}, {"halt_threshold": 0.4}):
        expected = [answer.ids for answer in ours.answers(questions, **options)]
        generated = theirs.generate(**inputs, generation_config=GenerationConfig(**options))
        new = [row[row != tokenizer.eos_token_id].tolist() for row in generated[:, inputs["input_ids"].shape[1] :]]
        assert new == expected and len({tuple(ids) for ids in new}) > 1


def test_cached_decoding_equals_full_forwards_and_beams_are_kept_apart(trained: Trained) -> None:
    model, tokenizer, _ = exported(trained("arch.H_cycles=1"))
    inputs = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    for options in ({}, {"num_beams": 3}, {"halt_threshold": 0.4}):
        with_cache, without = (model.generate(**inputs, use_cache=use, **options).tolist() for use in (True, False))
        assert with_cache == without


@pytest.mark.parametrize("overrides", [("arch=trm",), PREFIX], ids=("causal", "prefix"))
@pytest.mark.parametrize("threshold", [None, 0.4])
def test_a_conversation_goes_on_from_its_cache(trained: Trained, overrides: tuple[str, ...], threshold: float | None) -> None:
    model, tokenizer, _ = exported(trained("arch.H_cycles=1", *overrides))
    ids = tokenizer.apply_chat_template(
        [*MESSAGES, {"role": "assistant", "content": "5 blue"}], return_dict=True, return_tensors="pt"
    )["input_ids"]
    # At the ends of the first and the second question, and within each answer.
    first, second = (int(place) for place in (ids[0] == tokenizer.eos_token_id).nonzero().flatten())
    with torch.no_grad():
        whole = model(ids, halt_threshold=threshold).logits
        cache, parts, begin = None, [], 0
        for end in (first - 1, first, second - 2, second + 1):
            # By either of its names.
            given = {"past_key_values" if len(parts) == 1 else "cache": cache}
            result = model(ids[:, begin:end], **given, use_cache=True, halt_threshold=threshold)
            cache, begin = result.cache, end
            parts.append(result.logits)
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-9


def test_it_runs_in_bfloat16(trained: Trained) -> None:
    checkpoint = trained("arch.H_cycles=1")
    model, tokenizer, _ = exported(checkpoint, torch.bfloat16)
    ids = tokenizer.apply_chat_template(MESSAGES, return_dict=True, return_tensors="pt")["input_ids"]
    logits = model(ids, act_steps=1).logits[0]
    ours = our_logits(checkpoint, ids[0].numpy(), np.zeros(ids.shape[1], np.int64), "bfloat16", 1, None)
    assert logits.dtype == torch.float32 and (logits - ours).abs().max() < 0.05 * ours.abs().max()


def test_the_examples_of_the_page_run(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = trained("arch.H_cycles=1")
    export_folder(checkpoint, tmp_path / "DIR")
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).resolve().parents[1] / "docs/export.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block.replace("checkpoints/<project>/<run>", str(checkpoint.folder)), {})


def test_a_calibrated_threshold_halts_where_ours_does(trained: Trained) -> None:
    checkpoint = trained("arch.H_cycles=1", "generation.halt_threshold=0.6")
    plain = load(checkpoint, device="cpu").answer("Red")
    write_halting_calibration(checkpoint, HaltingCalibration((0.5, 2.0, 1.0, 1.0), (-3.0, 0.5, 1.0, 0.0)))
    model, tokenizer, _ = exported(checkpoint)
    ours = load(checkpoint, device="cpu").answer("Red")
    assert ours.act_steps != plain.act_steps
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Red"}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    assert model.generate(**inputs)[0, inputs["input_ids"].shape[1] :][: len(ours.ids)].tolist() == ours.ids


def test_loss_is_that_of_our_log_probabilities(trained: Trained) -> None:
    checkpoint = trained("arch.loss=stablemax")
    model, tokenizer, _ = exported(checkpoint)
    responder = load(checkpoint, device="cpu")
    answered = [*MESSAGES, {"role": "assistant", "content": "5"}]
    ids = tokenizer.apply_chat_template(answered, return_dict=True, return_tensors="pt")["input_ids"]
    labels = ids.clone()
    labels[:, : responder.prompt_length(responder.conversation(MESSAGES))] = -100
    assert model(ids, labels=labels).loss.item() == pytest.approx(responder.score(MESSAGES, "5").nats_per_token, rel=1e-6)


def test_a_pipeline_answers_messages(trained: Trained) -> None:
    checkpoint = trained("arch.H_cycles=1", "dataset.default_system_prompt='Be blue.'")
    _, tokenizer, folder = exported(checkpoint)
    answer = pipeline("text-generation", str(folder), trust_remote_code=True, dtype=torch.float64, device="cpu")
    (result,) = answer([MESSAGES], do_sample=False)
    assert result[0]["generated_text"][:-1] == MESSAGES
    # A random model's bytes are no text, which transformers shows otherwise.
    shown = tokenizer.decode(load(checkpoint, device="cpu").chat(MESSAGES).ids)
    assert result[0]["generated_text"][-1] == {"role": "assistant", "content": shown}


@pytest.mark.parametrize("overrides", [(), ("arch.tie_embeddings=true",)])
def test_weights_survive_the_way_there_and_back(trained: Trained, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    checkpoint = trained("arch=hrm", *overrides)
    model, _, folder = exported(checkpoint, torch.float32)
    model.save_pretrained(tmp_path / "again")
    ours = checkpoint.weights(ema=True)
    for place in (folder, tmp_path / "again"):
        found = load_file(place / "model.safetensors")
        assert found.keys() == ours.keys() and all(torch.equal(found[name], ours[name].float()) for name in ours)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert read_weights(folder).keys() == ours.keys()


def test_the_folder_says_what_the_model_is(trained: Trained) -> None:
    checkpoint = trained("arch=hrm", "generation.act_steps=2", "dataset=hub", "dataset.repo=someone/rows", "dataset.split=train")
    folder = checkpoint.folder.parent / "stated"
    export_folder(checkpoint, folder, licence="mit")
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "mit" and card.data.datasets == ["someone/rows"] and card.data.library_name == "transformers"
    settings = yaml.safe_load(card.text.partition("```yaml\n")[2].partition("```")[0])
    assert settings == json.loads(json.dumps(checkpoint.config.model_dump()))
    assert "| held out: bits per byte | 1.25 |" in card.text and "| read | 12 |" in card.text
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.max_new_tokens, generation.do_sample) == (8, False)
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).act_steps == 2
    with pytest.raises(UsageError, match="exists already and is not overwritten"):
        export_folder(checkpoint, folder)


def test_a_depth_that_the_model_lacks_is_refused(trained: Trained) -> None:
    model, _, _ = exported(trained())
    with pytest.raises(ValueError, match="act_steps is 5: the model has 1 to 4"):
        model(torch.tensor([[1, 2]]), act_steps=5)


def test_the_command_writes_and_uploads(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = trained()
    folder = checkpoint.folder.parent / "out"
    words = ["export_hf.py", "--checkpoint", str(checkpoint.folder), "--output-dir", str(folder), "--push", "me/tiny"]
    script = str(Path(__file__).resolve().parents[1] / "scripts/export_hf.py")
    with mock.patch("sys.argv", words), mock.patch("huggingface_hub.HfApi") as api:
        api.return_value.upload_folder.return_value = "https://hub/me/tiny/commit/1"
        runpy.run_path(script, run_name="__main__")
    api.return_value.create_repo.assert_called_once_with("me/tiny", exist_ok=True)
    api.return_value.upload_folder.assert_called_once_with(repo_id="me/tiny", folder_path=folder)
    assert capsys.readouterr().out == f"wrote {folder}\nhttps://hub/me/tiny/commit/1\n" and (folder / "model.safetensors").is_file()


def test_the_modeling_file_is_whole_and_written_as_the_project_is(tmp_path: Path) -> None:
    (tmp_path / "modeling_trm.py").write_text(modeling_file())
    for words in (["check", "--select", "E,F,I", "--line-length", "132"], ["format", "--check", "--line-length", "132"]):
        subprocess.run([sys.executable, "-m", "ruff", *words, "--isolated", "modeling_trm.py"], cwd=tmp_path, check=True)


def test_an_upload_that_fails_is_one_message(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = trained()
    words = ["export_hf.py", "--checkpoint", str(checkpoint.folder), "--output-dir", str(checkpoint.folder / "out")]
    script = str(Path(__file__).resolve().parents[1] / "scripts/export_hf.py")
    with mock.patch("sys.argv", [*words, "--push", "no/such/name"]), pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    assert ended.value.code == 2 and "is written, but no/such/name can't be uploaded" in capsys.readouterr().err


def test_a_run_begins_with_the_weights_of_a_folder(tmp_path: Path, run_config: Callable[..., PretrainInstructConfig]) -> None:
    # A learning rate that rounds to nothing.
    still = ("max_steps=1", "lr=1e-30", "weight_decay=0", "ema=false")
    first = run_instruct(run_config(tmp_path / "first", "max_steps=1")).checkpoint
    export_folder(open_checkpoint(first), tmp_path / "exported")
    again = run_instruct(run_config(tmp_path / "again", f"load_checkpoint={tmp_path / 'exported'}", *still)).checkpoint
    expected, found = read_weights(first), read_weights(again)
    assert all(torch.equal(found[name], expected[name]) for name in expected)

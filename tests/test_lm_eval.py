"""lm-evaluation-harness on an exported model, and on a server, gives our evaluator's figures (evaluators/lm_eval)."""

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Backend

from artifacts.checkpoint import Snapshot, TrainerState, open_checkpoint, save_checkpoint
from artifacts.hf.export import export_folder
from config.schema import PretrainInstructConfig
from dataset.text.conversation import Template, Turn, encode_conversation
from dataset.text.loader import TextDataset
from dataset.text.portable_tokenizer import BOS, EOS, chat_template, portable_tokenizer
from dataset.text.tokenizer import Tokenizer
from evaluators.answer_scores import is_exact
from evaluators.language import evaluate_language
from generation import load
from models.act import RecursiveModel
from scripts import serve
from tests.running_server import Running

TASKS = Path(__file__).resolve().parents[1] / "evaluators/lm_eval"
OVERRIDES = (
    "arch.halt_max_steps=2",
    "arch.H_cycles=1",
    "arch.forward_dtype=float32",
    "dataset.seq_len=256",
    "generation.max_output_tokens=6",
)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["causal", "prefix"])
def test_both_tasks_give_our_figures(
    tmp_path: Path,
    tiny_config: Callable[..., PretrainInstructConfig],
    tiny_model: Callable[..., RecursiveModel],
    tiny_tokenizer: Tokenizer,
    text_dataset: Callable[[Any], TextDataset],
    attention: str,
) -> None:
    overrides = (*OVERRIDES, f"arch.attention={attention}")
    model = tiny_model(*overrides, vocab_size=tiny_tokenizer.vocab_size)
    model.embed_tokens.embedding_weight.data *= 8
    no_text = [tiny_tokenizer.piece(token).startswith("<") for token in range(tiny_tokenizer.vocab_size)]
    model.lm_head.weight.data[torch.tensor(no_text)] = 0  # so that answers are text
    checkpoint = tmp_path / "step_1"
    save_checkpoint(
        checkpoint,
        Snapshot(1, model.state_dict(), None, {}, TrainerState({}, {})),
        config=tiny_config(*overrides),
        tokenizer=tiny_tokenizer,
        template=Template(),
        data_hash="",
    )
    export_folder(open_checkpoint(checkpoint), tmp_path / "exported")
    ours = load(checkpoint, device="cpu")
    rows = []
    for i in range(200):
        asked = [{"role": "user", "content": f"What is {i} plus\n{i % 7} "}]
        if i % 3 == 0:
            asked = [{"role": "system", "content": "Red"}, *asked, {"role": "assistant", "content": f" é{i}"}, asked[0]]
        reference = ours.chat(asked).text if i % 2 else f"{i} blue"
        rows.append({"messages": [*asked, {"role": "assistant", "content": reference}]})
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    server = Running(ours, serve.Access("exported"), queue=64)
    folder = f"trust_remote_code=True,tokenizer={tmp_path / 'exported'}"
    api = f"model=exported,base_url={server.url}/v1/completions,tokenizer_backend=huggingface,max_length=257,num_concurrent=2"
    ways = {
        "hf": (f"pretrained={tmp_path / 'exported'},{folder}", "--device", "cpu", "--batch_size", "16"),
        "local-completions": (f"{api},{folder}", "--batch_size", "8", "--gen_kwargs", "max_gen_toks=6"),
    }
    results = {}
    try:
        for way, (model_args, *further) in ways.items():
            command = [
                *(sys.executable, "-m", "lm_eval", "--model", way, "--model_args", model_args, *further),
                *("--include_path", str(TASKS), "--tasks", "instruct_bits_per_byte,instruct_exact"),
                *("--metadata", json.dumps({"rows": str(file), "pretrained": str(tmp_path / "exported")})),
                *("--output_path", str(tmp_path / way)),
            ]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-2000:]
            [report] = (tmp_path / way).rglob("results_*.json")
            results[way] = json.loads(report.read_text())["results"]
    finally:
        server.stop()
    measured = evaluate_language(ours.model, text_dataset(rows), eos_id=tiny_tokenizer.eos_id, batch_size=16, act_steps=2).by_depth[
        -1
    ]
    answers = ours.answers([row["messages"][:-1] for row in rows])
    right = [is_exact(row["messages"][-1]["content"], answer.text) for row, answer in zip(rows, answers, strict=True)]
    assert 100 <= sum(right) < 200
    for way in ways:
        bits_per_byte = results[way]["instruct_bits_per_byte"]["bits_per_byte,none"]
        assert bits_per_byte == pytest.approx(measured.metrics()["bits_per_byte"], abs=1e-3), way
        assert results[way]["instruct_exact"]["exact,none"] == sum(right) / 200, way


def test_documents_are_prompts_and_their_answers(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    rows = runpy.run_path(str(TASKS / "rows.py"))
    (tmp_path / "tokenizer.json").write_text(portable_tokenizer(tiny_tokenizer, Template()))
    (tmp_path / "chat_template.jinja").write_text(chat_template(Template(), None))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": BOS, "eos_token": EOS}))
    asked, said = [{"role": "user", "content": "Red"}], {"role": "assistant", "content": "blué"}
    file = tmp_path / "rows.jsonl"
    messages = [*asked, said, *asked, {"role": "assistant", "content": "1"}]
    lines = [{"messages": messages}, {"index": 0, "prompt": asked, "reference": "blué", "answer": "no"}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    every, last = (
        rows[name](rows=str(file), pretrained=str(tmp_path), device="cpu")["test"] for name in ("every_answer", "last_answer")
    )
    assert every["answer"] == ["blué", "1", "blué"] and last["answer"] == ["1", "blué"]
    fast = Backend.from_file(str(tmp_path / "tokenizer.json"))
    for doc, history in ((every[0], messages[:1]), (every[1], messages[:3]), (last[0], messages[:3])):
        turns = [*(Turn(message["role"], message["content"]) for message in history), Turn("assistant", doc["answer"])]
        ids = encode_conversation(turns, tiny_tokenizer, Template()).ids.tolist()
        assert fast.encode(doc["prompt"] + doc["answer"] + EOS, add_special_tokens=False).ids == ids
        assert doc["prompt"] == doc["prompt"].rstrip(), "the harness would move a blank to the answer"
    assert rows["bits_per_byte"](every[0], [(-2.0, True)]) == {"bits_per_byte": (-2.0, 5)}
    assert rows["exact"](every[0], [" blué\n"]) == {"exact": True} != rows["exact"](every[0], ["Blué"])
    file.write_text(json.dumps({"messages": asked}) + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl line 1: expected messages that end with an answer"):
        rows["last_answer"](rows=str(file), pretrained=str(tmp_path))

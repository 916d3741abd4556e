"""A run that an earlier version of the program began, at commit cc21a0b, is resumed and ends with the weights it then ended with.

tests/earlier_run/ holds its checkpoint of step 16 and its logs (`run/`), its rows (`rows/`), and the weights and metrics at its
end, step 30. Never make it anew: it stands for checkpoints that people have.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from config.compose import compose_config
from generation import load
from training.instruct_run import run_instruct

EARLIER = Path(__file__).parent / "earlier_run"
# What was typed then, but for the places, `resume`, and the optimizer, which was the default.
SETTINGS = (
    *("dataset=jsonl", "dataset.seq_len=64", "dataset.default_system_prompt=null", "dataset.test_ratio=0.2"),
    *("arch.hidden_size=16", "arch.num_heads=2", "arch.expansion=1", "arch.L_layers=1", "arch.forward_dtype=float64"),
    *(
        "arch.attention=prefix",
        "arch.tie_embeddings=true",
        "global_batch_size=4",
        "epochs=8",
        "lr=1e-2",
        "optimizer=adam_atan2",
        "log_interval=3",
    ),
    *("dataloader_workers=0", "eval_every_steps=10", "sample_answers=0", "device=cpu", "plot=false", "project_name=fixture"),
    *("checkpoint.every_steps=16", "checkpoint.keep_last=null", "run_name=earlier"),
)
# What the model at its end said and scored then.
ANSWER, NATS = "8 are 8 are 8 are 8 are    ", 1.8092459045102027


def test_it_resumes_and_ends_as_it_did_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run = tmp_path / "fixture" / "earlier"
    shutil.copytree(EARLIER / "run", run)
    places = (
        f"dataset.data_dir={EARLIER / 'rows'}",
        f"dataset.cache_dir={tmp_path / 'cache'}",
        f"dataset.tokenizer_path={run / 'step_16/tokenizer.model'}",
        f"checkpoint_dir={tmp_path}",
    )
    result = run_instruct(compose_config("cfg_pretrain_instruct", [*SETTINGS, *places, "resume=auto", "report=false"]))
    assert result is not None and result.checkpoint == run / "step_30"
    ended, then = load_file(result.checkpoint / "model.safetensors"), load_file(EARLIER / "end.safetensors")
    assert ended.keys() == then.keys()
    for name, tensor in then.items():
        # On the machine it was made on, bit for bit; elsewhere sums have other orders.
        torch.testing.assert_close(ended[name], tensor, rtol=0, atol=1e-9, msg=name)
    lines, lines_then = (
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for folder, name in ((run, "metrics.jsonl"), (EARLIER, "end_metrics.jsonl"))
    )
    assert len(lines) == len(lines_then)
    for line, line_then in zip(lines, lines_then, strict=True):
        assert line["step"] == line_then["step"]
        if "loss_per_token" in line_then:
            assert line["loss_per_token"] == pytest.approx(line_then["loss_per_token"], rel=1e-9)
    model = load(result.checkpoint)
    assert model.answer("What is 3 plus 4?").text == ANSWER
    assert model.score("What is 3 plus 4?", "7 and 2 are 9.").nats_per_token == pytest.approx(NATS, rel=1e-9)

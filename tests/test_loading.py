"""From a checkpoint to a model that answers: `generation.load`, its options, and the examples of the Python interface."""

import doctest
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import generation.answers
import generation.loading
from artifacts.checkpoint import Snapshot, TrainerState, open_checkpoint, save_checkpoint
from config.errors import UsageError
from config.schema import PretrainInstructConfig
from dataset.text.conversation import Template, Turn
from dataset.text.tokenizer import Tokenizer
from generation import load
from generation.answers import Options
from generation.sampling import Sampling

REPOSITORY = Path(__file__).resolve().parents[1]
RUN = Path("checkpoints/demo/run")


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_config: Callable[..., PretrainInstructConfig],
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Tokenizer,
) -> Path:
    """A folder with a run in it whose newest checkpoint is step_2; the model has a default system turn."""
    place = tmp_path_factory.mktemp("place")
    overrides = ("dataset.seq_len=256", "dataset.default_system_prompt='Be blue.'", "generation.max_output_tokens=6")
    (place / RUN).mkdir(parents=True)
    for step in (1, 2):
        model = tiny_model(*overrides, vocab_size=tiny_tokenizer.vocab_size, seed=step)
        save_checkpoint(
            place / RUN / f"step_{step}",
            Snapshot(step, model.state_dict(), None, {}, TrainerState({}, {})),
            config=tiny_config(*overrides),
            tokenizer=tiny_tokenizer,
            template=Template(),
            data_hash="",
        )
    return place


@pytest.mark.parametrize("module", [generation.answers, generation.loading])
def test_the_examples_of_the_interface_hold(place: Path, monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    monkeypatch.chdir(place)
    found = doctest.testmod(module, extraglobs={"load": load})
    assert found.attempted and not found.failed


@pytest.mark.parametrize("page", ["README.md", "docs/export.md"])
def test_the_first_example_of_a_page_runs(place: Path, monkeypatch: pytest.MonkeyPatch, page: str) -> None:
    [example, *_] = re.findall(r"^```python\n(.*?)^```", (REPOSITORY / page).read_text(), re.MULTILINE | re.DOTALL)
    example, paths = re.subn(r'"checkpoints/[^"]+"', f'"{RUN}"', example)
    assert paths == 1
    monkeypatch.chdir(place)
    exec(compile(example, page, "exec"), {})


def test_a_run_a_checkpoint_and_an_open_one_are_the_same_model(place: Path) -> None:
    newest = place / RUN / "step_2"
    answers = [load(source).answer("Red 1").ids for source in (place / RUN, str(newest), open_checkpoint(newest))]
    assert answers[0] == answers[1] == answers[2] != load(place / RUN / "step_1").answer("Red 1").ids


def test_options_go_over_the_config_and_that_over_the_checkpoint(
    place: Path, tiny_config: Callable[..., PretrainInstructConfig]
) -> None:
    assert load(place / RUN).options == Options(6, 4)
    config = tiny_config("generation.max_output_tokens=9", "generation.act_steps=2", "generation.temperature=0.5")
    loaded = load(place / RUN, config, act_steps=3, top_k=5, stop=["a"], kv_budget_gb=2.0, dtype="float32")
    assert loaded.options == Options(9, 3, None, Sampling(temperature=0.5, top_k=5), ("a",))
    assert loaded.kv_budget_gb == 2.0 and loaded.model.config.forward_dtype == "float32"


def test_a_question_opens_with_the_system_turn_of_the_model_or_its_own_or_none(place: Path) -> None:
    user, said = {"role": "user", "content": "Red"}, (Turn("user", "Red"),)
    model = load(place / RUN)
    for asked in ("Red", [user], (user,)):
        assert model.conversation(asked) == (Turn("system", "Be blue."), *said)
    assert model.conversation([{"role": "system", "content": " "}, user]) == said == model.conversation(said)
    assert load(place / RUN, system="").conversation("Red") == said
    assert load(place / RUN, system="Be red.").conversation("Red") == (Turn("system", "Be red."), *said)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"temprature": 1}, "generation.temprature: no such key"),
        ({"top_p": 2}, "generation.top_p"),
        ({"act_steps": 5}, "act_steps 5 is more than arch.halt_max_steps 4"),
        ({"device": "abacus"}, "device"),
        ({"dtype": "int4"}, "arch.forward_dtype"),
    ],
)
def test_a_wrong_option_is_one_clear_message(place: Path, options: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        load(place / RUN, **options)

"""A tokenizer of one's own, trained or trimmed: it gives every text back, sees no held-out row, and a run uses it to the end."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mistral_common
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from artifacts.checkpoint import open_checkpoint
from config.errors import UsageError
from config.schema import PretrainInstructConfig
from dataset.instruct import Source
from dataset.text.conversation import Template, Turn
from dataset.text.tokenizer import Tokenizer
from generation import load
from scripts import train_tokenizer as script
from tests import tokenizer_files
from training.instruct_run import run_instruct

ROWS = [
    ("def f(x):\n    return x\n\n\n", "Indented:\r\n\tby a tab", "  leading and trailing  "),
    *((f"What is {n} plus {n + 1}?\n\n- one\n- two", f"It's {2 * n + 1}.   Three blanks.") for n in range(60)),
]
TRAINED = script.train_tokenizer(ROWS, 400)
LLAMA = Path(mistral_common.__file__).parent / "data/tokenizer.model.v1"
BLANKS = st.sampled_from(
    ["\n", "\n\n", "\r\n", " ", "  ", "    ", "\t", "\x00", "\u2028", "\u00a0", "\u2585", "<s>", "</s>", "1234"]
)
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")


@given(st.lists(BLANKS | st.text(CHARACTERS, max_size=8), max_size=8).map("".join))
@settings(max_examples=300)
def test_every_text_comes_back_and_has_no_control_or_unknown_id(text: str) -> None:
    ids = TRAINED.encode(text)
    assert TRAINED.decode(ids) == text
    assert not {0, TRAINED.bos_id, TRAINED.eos_id} & set(ids)


def test_the_model_is_of_the_kind_that_the_program_needs() -> None:
    assert (TRAINED.vocab_size, TRAINED.bos_id, TRAINED.eos_id) == (400, 1, 2)
    pieces = [TRAINED.piece(token) for token in TRAINED.encode("What is 34?\n\n- one   two")]
    assert "\u2581What" in pieces and {"3", "4"} <= set(pieces) and not {"34", "\u258134"} & set(pieces), "digit by digit"
    assert "\n\n" in "".join(pieces) and "\u2581\u2581" in pieces, "newlines and runs of blanks are pieces"
    assert script.train_tokenizer(ROWS, 400).model_bytes == TRAINED.model_bytes


def test_text_beside_reserved_characters_is_learned_from() -> None:
    tokenizer = script.train_tokenizer([("zebra\tzebra\x00zebra\u2585zebra",)] * 20 + ROWS, 400)
    assert tokenizer.encode("zebra") == [next(token for token in range(400) if tokenizer.piece(token) == "\u2581zebra")]


@pytest.mark.parametrize(
    ("rows", "size", "expected"), [([], 400, "found none"), (ROWS, 50_000, "at most"), (ROWS, 260, "at least")]
)
def test_a_vocabulary_that_cannot_be_is_told(rows: list[tuple[str, ...]], size: int, expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        script.train_tokenizer(rows, size)


def test_no_rows_to_trim_to_is_told() -> None:
    with pytest.raises(UsageError, match="found none"):
        script.trim_tokenizer(TRAINED, [])


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.piece(token) for token in tokenizer.encode(text)]


TEXTS = st.lists(
    BLANKS | st.text(CHARACTERS, max_size=8) | st.sampled_from(["What is", "plus", "leading", "Indented:"]), max_size=8
)


@given(st.lists(TEXTS.map("".join), min_size=1, max_size=4), TEXTS.map("".join))
@settings(max_examples=100)
def test_a_trimmed_tokenizer_cuts_its_rows_as_before_and_says_any_text(row: list[str], other: str) -> None:
    trimmed = script.trim_tokenizer(TRAINED, [tuple(row)])
    assert trimmed.vocab_size < TRAINED.vocab_size and (trimmed.bos_id, trimmed.eos_id) == (1, 2)
    for text in (*row, "[SYSTEM]\n", "[USER]\n", "[ASSISTANT]\n"):
        assert pieces(trimmed, text) == pieces(TRAINED, text)
    for text in (*row, other):
        assert trimmed.decode(trimmed.encode(text)) == text and 0 not in trimmed.encode(text)


def test_trimming_keeps_what_is_used_and_what_that_is_merged_from() -> None:
    llama = Tokenizer(LLAMA)
    trimmed = script.trim_tokenizer(llama, ROWS)
    # 256 bytes, three that stand for no text, a few hundred for the words of the rows.
    assert 259 < trimmed.vocab_size < 700
    for text in itertools.chain.from_iterable(ROWS):
        assert pieces(trimmed, text) == pieces(llama, text)
    left = {trimmed.piece(token) for token in range(trimmed.vocab_size)}
    assert "\u2581What" in left and "\u2581Which" not in left
    merged = [piece for piece in left if len(piece) > 1 and not piece.startswith("<")]
    assert merged and all(any(piece[:at] in left and piece[at:] in left for at in range(1, len(piece))) for piece in merged)
    assert script.trim_tokenizer(llama, ROWS).model_bytes == trimmed.model_bytes
    rows = [("What is what? What is it?", "A zebra.")]
    rare = script.trim_tokenizer(llama, rows, min_count=2)
    left = {rare.piece(token) for token in range(rare.vocab_size)}
    assert "\u2581What" in left and rare.vocab_size < script.trim_tokenizer(llama, rows).vocab_size
    assert rare.decode(rare.encode("A zebra.")) == "A zebra."
    unseen = "\u65e5\u672c Which one?"
    assert trimmed.decode(trimmed.encode(unseen)) == unseen and len(trimmed.encode(unseen)) > len(llama.encode(unseen))


@pytest.mark.parametrize(
    "content",
    [
        tokenizer_files.byte_level(),
        tokenizer_files.sentencepiece_model(model_type="unigram", byte_fallback=True),
        tokenizer_files.sentencepiece_model(model_type="bpe"),
    ],
    ids=["tokenizer.json", "unigram", "no byte fallback"],
)
def test_a_tokenizer_of_another_kind_is_not_trimmed(content: bytes) -> None:
    with pytest.raises(UsageError, match="isn't a SentencePiece model of the kind BPE with byte fallback: name one by"):
        script.trim_tokenizer(Tokenizer.from_bytes(content), ROWS)


def test_a_draw_of_rows_depends_on_the_seed_alone() -> None:
    rows = [(f"row {n}",) for n in range(50)]
    drawn = script.draw_rows(rows, 10, 0)
    assert len(set(drawn)) == 10 and drawn == script.draw_rows(iter(rows), 10, 0) != script.draw_rows(rows, 10, 1)
    assert sorted(script.draw_rows(rows, 99, 0)) == sorted(rows)


def write(folder: Path, words: int = 400) -> Path:
    """A word of its own in each row, which a row that was read leaves in the vocabulary."""
    rows = [{"prompt": f"Say word{n}x{n}.", "answer": f"Word{n} it is."} for n in range(words)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def test_the_rows_are_those_of_a_run_with_the_same_settings(tmp_path: Path) -> None:
    write(tmp_path)
    for changes in (
        ("dataset.seed=3",),
        ("dataset.default_system_prompt=null", "dataset.subset_size=70", "dataset.test_ratio=0.2"),
    ):
        config = script.settings(tmp_path, changes)
        data = Source(config.dataset).open_splits(Tokenizer(LLAMA), Template())
        for name, opened in zip(("train", "test"), data, strict=True):
            read = [tuple(turn.text for turn in opened.conversation(index)) for index in range(len(opened))]
            assert list(script.rows_of(config, name))[: len(read)] == read
        assert len(list(script.rows_of(config, "train"))) == len(data[0])


def test_data_is_named_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="names the data already"):
        script.settings(write(tmp_path), ["dataset=openorca"])
    assert script.settings(None, ["dataset=openorca"]).dataset.source == "openorca"


@pytest.mark.parametrize("flag", ["--max-rows", "--vocab-size"])
def test_numbers_that_cannot_be_are_told(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        script.main(["--vocab-size", "400", flag, "0"])
    assert caught.value.code == 2 and f"{flag}: expected 1 or more, found 0" in capsys.readouterr().err


def test_bad_and_useless_rows_are_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path, 3)
    path.write_text(path.read_text() + '{"prompt": 1}\nnot json\n{"prompt": "no answer"}\n\n')
    config = script.settings(path, ["dataset.test_ratio=0", "dataset.on_bad_row=skip"]).dataset
    assert len(list(Source(config).conversations("train"))) == 3
    config = script.settings(path, ["dataset.test_ratio=0"]).dataset
    with pytest.raises(UsageError, match=r"jsonl:4: .*expected a string, found.*dataset\.on_bad_row=skip"):
        list(Source(config).conversations("train"))


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LLAMA_TOKENIZER", str(LLAMA))
    path, output = write(tmp_path), tmp_path / "own/tokenizer.model"
    arguments = [
        "--vocab-size",
        "350",
        "--data",
        str(path),
        "--output",
        str(output),
        "dataset.test_ratio=0.25",
        "arch.hidden_size=32",
    ]
    script.main([*arguments, "--max-rows", "200"])
    first, own, default = capsys.readouterr().out.splitlines()
    assert first == "trained on 200 rows"
    assert f"{output}: 350 pieces" in own and f"{LLAMA}: 32,000 pieces" in default
    # Twice 31,650 vectors of 32 make the difference.
    parameters = [float(line.split(" has ")[1].split(" M")[0]) for line in (own, default)]
    assert parameters[1] - parameters[0] == pytest.approx(2.0, abs=0.11) and "bytes a token on held-out rows" in own
    with pytest.raises(SystemExit) as caught:
        script.main(arguments)
    assert caught.value.code == 2 and "exists already" in capsys.readouterr().err


def test_the_command_that_trims(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, output = write(tmp_path), tmp_path / "own/tokenizer.model"
    settings = ["dataset.test_ratio=0.25", "arch.hidden_size=32", f"dataset.tokenizer_path={LLAMA}"]
    script.main(["--trim", "--data", str(path), "--output", str(output), *settings])
    first, own, before = capsys.readouterr().out.splitlines()
    assert first.startswith("trimmed to the pieces of ") and f"{LLAMA}: 32,000 pieces" in before
    trimmed = Tokenizer(output)
    assert f"{output}: {trimmed.vocab_size} pieces" in own and trimmed.vocab_size < 700
    with pytest.raises(SystemExit) as caught:
        script.main(["--trim", "--vocab-size", "400"])
    assert caught.value.code == 2 and "not allowed with" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        script.main(["--vocab-size", "400", "--min-count", "2"])
    assert caught.value.code == 2 and "--min-count trims" in capsys.readouterr().err


def test_a_run_refuses_a_tokenizer_that_loses_text_before_it_tokenizes(
    run_config: Callable[..., PretrainInstructConfig], short_run_data: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(short_run_data, data)
    with (data / "rows.jsonl").open("a") as rows:
        rows.write(json.dumps({"prompt": "Two lines, please.", "answer": "one\ntwo"}) + "\n")
    (data / "lossy.model").write_bytes(tokenizer_files.sentencepiece_model(byte_fallback=True))
    cache = tmp_path / "cache"
    places = (f"dataset.data_dir={data}", f"dataset.tokenizer_path={data / 'lossy.model'}", "dataset.test_ratio=0.01")
    with pytest.raises(UsageError, match=r"lossy\.model loses text: expected to get back 'one\\ntwo', found 'one two'"):
        run_instruct(run_config(tmp_path / "runs", *places, f"dataset.cache_dir={cache}"))
    assert not cache.exists()


@pytest.mark.parametrize("kind", ["tokenizer.model", "tokenizer.json"])
def test_a_run_from_tokenizer_to_answer(
    kind: str, run_config: Callable[..., PretrainInstructConfig], short_run_data: Path, tmp_path: Path
) -> None:
    path = tmp_path / f"mine-{kind}"
    rows = script.rows_of(script.settings(short_run_data, ["dataset.files=[rows.jsonl]"]), "train")
    model = script.train_tokenizer(rows, 330).model_bytes if kind == "tokenizer.model" else tokenizer_files.byte_level()
    path.write_bytes(model)
    folder = run_instruct(run_config(tmp_path / "runs", f"dataset.tokenizer_path={path}")).checkpoint
    assert folder is not None and int(folder.name.removeprefix("step_")) >= 20
    path.unlink()  # the checkpoint is enough
    assert (folder / kind).read_bytes() == model and len(list(folder.glob("tokenizer.*"))) == 1
    checkpoint = open_checkpoint(folder, str(folder / kind))
    responder = load(checkpoint, checkpoint.config).with_options(max_output_tokens=8)
    (answer,) = responder.answers([(Turn("user", "What is 1 plus 2?"),)])
    assert answer.ids and answer.text == checkpoint.tokenizer.decode(answer.ids)
    with pytest.raises(UsageError, match="another tokenizer"):
        open_checkpoint(folder, str(LLAMA))
    (folder / kind).unlink()
    with pytest.raises(UsageError, match="is damaged"):
        open_checkpoint(folder)

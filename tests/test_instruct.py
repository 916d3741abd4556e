"""Sources as configured: which files, the split and subset of each kind, and sources that can't be used."""

import datetime
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import mistral_common
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
import zstandard

from config.compose import compose_config
from config.errors import UsageError
from config.schema import PretrainInstructConfig
from dataset.instruct import Source, last_exchange, open_run_data, open_run_split
from dataset.text.conversation import Template, Turn
from dataset.text.curriculum import Curriculum, Stage
from dataset.text.loader import TextCorpus, TextDataset, overlap
from dataset.text.tokenizer import Tokenizer

MODEL = Path(mistral_common.__file__).parent / "data/tokenizer.model.v1"
TOKENIZER = Tokenizer(MODEL)


def chat(number: int) -> dict[str, Any]:
    return {
        "conversations": [
            {"from": "human", "value": f"Question {number}?", "weight": 0},
            {"from": "gpt", "value": f"Answer {number}.", "weight": 1},
        ]
    }


def write(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def open_data(data_dir: Path, **changes: Any) -> tuple[TextDataset, TextDataset | None]:
    config = compose_config("cfg_pretrain_instruct", ["dataset.seq_len=64", "dataset.repo=null"]).dataset
    settings = {"data_dir": str(data_dir), "subset_size": None, "test_ratio": 0.25, "default_system_prompt": "Help.", **changes}
    return Source(config.model_copy(update=settings)).open_splits(TOKENIZER, Template())


def questions(dataset: TextDataset) -> set[str]:
    return {dataset.conversation(index)[1].text for index in range(len(dataset))}


def test_slimorca_is_split_by_hash(tmp_path: Path) -> None:
    write(tmp_path / "SlimOrca.jsonl", [chat(number % 60) for number in range(120)])
    train, test = open_data(tmp_path)
    assert test is not None and len(train) + len(test) == 120
    assert not questions(train) & questions(test)
    assert all(train.conversation(0)[i].role == role for i, role in enumerate(("system", "user", "assistant")))
    whole, nothing = open_data(tmp_path, test_ratio=0.0)
    assert len(whole) == 120 and nothing is None


def test_a_subset_has_its_rows_of_both_splits(tmp_path: Path) -> None:
    write(tmp_path / "SlimOrca.jsonl", [chat(number) for number in range(300)])
    train, test = open_data(tmp_path, subset_size=30)
    assert test is not None and (len(train), len(test)) == (30, 10)


def test_the_sample_layout_brings_its_own_split(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{**chat(number), "task": "add"} for number in range(20)])
    write(tmp_path / "test.jsonl", [{**chat(number), "task": "add"} for number in range(20, 28)])
    train, test = open_data(tmp_path, source="sample", test_ratio=0.05)
    assert test is not None
    assert questions(train) == {f"Question {number}?" for number in range(20)}
    assert questions(test) == {f"Question {number}?" for number in range(20, 28)}
    assert test.row(0)["task"] == "add"
    train, test = open_data(tmp_path, source="sample", subset_size=5)
    assert test is not None and (len(train), len(test)) == (5, 5)
    assert train.place(4) == f"{tmp_path / 'train.jsonl'}:5"
    assert open_data(tmp_path, source="sample", test_ratio=0)[1] is None


def test_the_cache_goes_where_it_is_told(tmp_path: Path) -> None:
    write(tmp_path / "data/SlimOrca.jsonl", [chat(number) for number in range(40)])
    open_data(tmp_path / "data", cache_dir=str(tmp_path / "cache"))
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["SlimOrca.jsonl"]
    assert (tmp_path / "cache").is_dir()


def test_a_sample_folder_without_files_names_the_command_that_builds_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"dataset\.build_sample_dataset"):
        open_data(tmp_path, source="sample")
    write(tmp_path / "train.jsonl", [chat(0)])
    with pytest.raises(UsageError, match=r"test\.jsonl"):
        open_data(tmp_path, source="sample")


def test_deeper_questions_are_a_split_of_the_deep_families_alone(tmp_path: Path) -> None:
    def opened_deeper(source: str) -> TextDataset:
        config = compose_config("cfg_pretrain_instruct", [f"dataset={source}", f"dataset.data_dir={tmp_path}"]).dataset
        return Source(config).open_split("test_deeper", TOKENIZER, Template())

    with pytest.raises(UsageError, match=r"test_deeper\.jsonl.*--families deep"):
        opened_deeper("sample")
    write(tmp_path / "test_deeper.jsonl", [{**chat(number), "hops": 7} for number in range(5)])
    assert [opened_deeper("sample").row(index)["hops"] for index in range(5)] == [7] * 5
    with pytest.raises(UsageError, match="only the bundled deep families"):
        opened_deeper("jsonl")


def test_splits_without_a_row_are_told_with_the_counts(tmp_path: Path) -> None:
    write(tmp_path / "none/SlimOrca.jsonl", [{"prompt": "Why?"}, {"prompt": "How?", "answer": ""}])
    with pytest.raises(
        UsageError, match=r"train split.*empty \(rows read: 2.*left out: (no|empty)_answer 1, (no|empty)_answer 1\)"
    ):
        open_data(tmp_path / "none")
    write(tmp_path / "one/SlimOrca.jsonl", [chat(0)])
    with pytest.raises(UsageError, match=r"test split.*empty.*test_ratio=0"):
        open_data(tmp_path / "one", test_ratio=1e-9)
    write(tmp_path / "empty/SlimOrca.jsonl", [])
    with pytest.raises(UsageError, match=r"expected rows.*empty"):
        open_data(tmp_path / "empty")


def orca_table(numbers: range) -> Any:
    rows = [
        {"id": f"cot.{n}", "system_prompt": "" if n % 2 else "Think.", "question": f"Q{n}?", "response": f"A{n}."} for n in numbers
    ]
    return pyarrow.Table.from_pylist(rows)


def opened(*overrides: str) -> tuple[TextDataset, TextDataset | None]:
    config = compose_config("cfg_pretrain_instruct", [f"dataset.tokenizer_path={MODEL}", *overrides]).dataset
    return Source(config).open_splits(TOKENIZER, Template())


def test_openorca_is_its_two_parquet_files(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(orca_table(range(40)), tmp_path / "1M-GPT4-Augmented.parquet")
    pyarrow.parquet.write_table(orca_table(range(40, 60)), tmp_path / "3_5M-GPT3_5-Augmented.parquet")
    overrides = ("dataset=openorca", f"dataset.data_dir={tmp_path}", "dataset.test_ratio=0.2", "dataset.subset_size=null")
    train, test = opened(*overrides)
    assert test is not None and len(train) + len(test) == 60
    found = {dataset.conversation(i) for dataset in (train, test) for i in range(len(dataset))}
    systems = ("Think.", "You are a helpful assistant.")
    assert found == {(Turn("system", systems[n % 2]), Turn("user", f"Q{n}?"), Turn("assistant", f"A{n}.")) for n in range(60)}
    assert {train.row(i)["id"] for i in range(len(train))} < {f"cot.{n}" for n in range(60)}
    part, _ = opened(*overrides, "dataset.shards=1", "dataset.seed=1", "dataset.test_ratio=0")
    assert len(part) in (20, 40)


def test_jsonl_takes_files_of_every_kind(tmp_path: Path) -> None:
    write(tmp_path / "part/a.jsonl", [chat(n) for n in range(3)])
    (tmp_path / "part/b.json").write_text(json.dumps([{"prompt": f"Question {n}?", "answer": "x"} for n in range(3, 6)]))
    pyarrow.parquet.write_table(orca_table(range(6, 9)), tmp_path / "c.parquet")
    files = 'dataset.files=["part/*", c.parquet]'
    train, test = opened("dataset=jsonl", f"dataset.data_dir={tmp_path}", files, "dataset.test_ratio=0")
    assert test is None
    assert [train.place(i).removeprefix(f"{tmp_path}/") for i in range(9)] == [
        *(f"part/a.jsonl:{n}" for n in (1, 2, 3)),
        *(f"part/b.json, row {n}" for n in (1, 2, 3)),
        *(f"c.parquet, row {n}" for n in (1, 2, 3)),
    ]


def test_a_split_alone_has_rows_of_its_own(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [chat(n) for n in range(300)])
    overrides = [f"dataset.tokenizer_path={MODEL}", "dataset=jsonl", f"dataset.data_dir={tmp_path}", "dataset.subset_size=9"]
    config = compose_config("cfg_pretrain_instruct", overrides).dataset
    assert len(Source(config).open_split("test", TOKENIZER, Template())) == 9


@pytest.mark.parametrize("override", ["dataset.files=[a.jsonl]", "dataset.shards=1"])
def test_sources_that_know_their_files_take_none(override: str) -> None:
    with pytest.raises(UsageError, match="knows its files"):
        compose_config("cfg_pretrain_instruct", [override])


def test_a_read_only_folder_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "data/SlimOrca.jsonl", [chat(number) for number in range(40)])
    (tmp_path / "data").chmod(0o555)
    assert len(open_data(tmp_path / "data", test_ratio=0.0)[0]) == 40
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["SlimOrca.jsonl"]


def test_held_out_rows_of_ones_own(tmp_path: Path) -> None:
    write(tmp_path / "mine.jsonl", [chat(number) for number in range(30)])
    write(tmp_path / "theirs.jsonl", [chat(number) for number in range(25, 33)])
    where = ("dataset=jsonl", f"dataset.data_dir={tmp_path}", "dataset.files=[mine.jsonl]")
    train, test = opened(*where, "dataset.validation_files=[theirs.jsonl]")
    assert test is not None and (len(train), len(test)) == (30, 8)
    assert overlap(train, test) == {"questions": 5, "conversations": 5}
    config = compose_config("cfg_pretrain_instruct", [*where, "dataset.validation_files=[theirs.jsonl]"]).dataset
    assert len(Source(config).open_split("test", TOKENIZER, Template())) == 8
    train, test = opened(*where[:2], "dataset.validation_files=[theirs.jsonl]")
    assert test is not None and (len(train), len(test)) == (30, 8), "what is measured on isn't trained on"
    (tmp_path / "theirs.jsonl").rename(tmp_path / "mine-test.jsonl")
    train, test = opened(*where[:2])
    assert test is not None and (len(train), len(test)) == (30, 8), "the name says that it is held out"
    config = compose_config("cfg_pretrain_instruct", list(where[:2])).dataset
    train, test = Source(config, is_alone=False).open_splits(TOKENIZER, Template())
    assert test is not None and len(train) + len(test) == 30, "several sources are all split alike"
    config = compose_config("cfg_pretrain_instruct", [*where[:2], "dataset.test_ratio=0"]).dataset
    train, test = Source(config).open_splits(TOKENIZER, Template())
    assert test is None and len(train) == 30 and train.report()["left_out"] == ["mine-test.jsonl"], "it is named"


def test_a_saved_folder_has_its_own_splits(tmp_path: Path) -> None:
    rows = [chat(number) for number in range(20)]
    parts = {"train": datasets.Dataset.from_list(rows[:15]), "test": datasets.Dataset.from_list(rows[15:])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path)
    where = ("dataset=jsonl", f"dataset.data_dir={tmp_path}")
    train, test = opened(*where, "dataset.validation_split=test")
    assert test is not None and (len(train), len(test)) == (15, 5)
    assert questions(test) == {f"Question {number}?" for number in range(15, 20)}
    assert "left_out" not in train.report()
    train, _ = opened(*where, "dataset.split=test", "dataset.test_ratio=0")
    assert len(train) == 5 and train.report()["left_out"] == ["train"]
    train, _ = opened(where[0], f"dataset.data_dir={tmp_path.parent}", f"dataset.files=[{tmp_path.name}]", "dataset.test_ratio=0")
    assert len(train) == 15 and train.report()["left_out"] == ["test"]
    with pytest.raises(UsageError, match="no split 'dev'"):
        opened(*where, "dataset.validation_split=dev")


def test_the_same_rows_in_any_format_are_the_same_data(tmp_path: Path) -> None:
    rows = [chat(number) for number in range(12)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    pyarrow.feather.write_feather(table, tmp_path / "a.arrow")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    texts = [[turn["value"] for turn in row["conversations"]] for row in rows]
    (tmp_path / "a.csv").write_text("question,answer\n" + "".join(f"{','.join(pair)}\n" for pair in texts))
    (tmp_path / "a.tsv").write_text("question\tanswer\n" + "".join("\t".join(pair) + "\n" for pair in texts))
    pairs = {"question": [question.encode() for question, _ in texts], "answer": [answer for _, answer in texts]}
    pyarrow.parquet.write_table(pyarrow.table(pairs), tmp_path / "bytes.parquet")
    names = ("a.jsonl.zst", "a.json.gz", "a.parquet", "a.arrow", "saved", "a.csv", "a.tsv", "bytes.parquet")
    where = ("dataset=jsonl", f"dataset.data_dir={tmp_path}", "dataset.test_ratio=0.3")
    found = [opened(*where, f"dataset.files=[{name}]") for name in names]
    assert len({(train.data_hash, test.data_hash) for train, test in found if test is not None}) == 1
    configs = [compose_config("cfg_pretrain_instruct", [*where, f"dataset.files=[{name}]"]).dataset for name in names]
    train, _ = found[0]
    of_train = [[turn.text for turn in train.conversation(i)] for i in range(len(train))]
    for config in configs:
        assert [[turn.text for turn in conversation] for conversation in Source(config).conversations("train")] == of_train


def test_a_value_that_is_no_text_where_text_belongs_is_told(tmp_path: Path) -> None:
    for name, value in (("a", "café".encode("latin-1")), ("b", datetime.date(2020, 1, 1))):
        table = pyarrow.table({"question": ["Q"], "context": [value], "answer": ["A"], "made": [value]})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
        with pytest.raises(UsageError, match=r"row 1: context: expected a string, found '\{\"(bytes|date)\": true\}'"):
            opened("dataset=jsonl", f"dataset.data_dir={tmp_path}", f"dataset.files=[{name}.parquet]")


@pytest.mark.parametrize(
    ("is_saved", "override", "message"),
    [
        (False, "dataset.validation_split=test", "neither: name files"),
        (False, "dataset.split=test", "neither: name files"),
        (True, "dataset.validation_files=[a.jsonl]", "choose its splits"),
        (True, "dataset.shards=1", "choose its splits"),
        (True, "dataset.validation_split=train dataset.test_ratio=0", "leave out one of them"),
        (False, "dataset.validation_files=[a.jsonl] dataset.test_ratio=0", "leave out one of them"),
    ],
)
def test_settings_that_this_data_has_no_use_for_are_told(tmp_path: Path, is_saved: bool, override: str, message: str) -> None:
    if is_saved:
        datasets.Dataset.from_list([chat(0)]).save_to_disk(tmp_path)
    else:
        write(tmp_path / "a.jsonl", [chat(0)])
    with pytest.raises(UsageError, match=message):
        opened("dataset=jsonl", f"dataset.data_dir={tmp_path}", *override.split())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dataset=slimorca", "dataset.validation_files=[a.jsonl]"], "knows its files"),
        (["dataset=openorca", "dataset.validation_split=test"], "no splits of its own"),
        (["dataset=openorca", "dataset.split=test"], "no splits of its own"),
        (["dataset=jsonl", "dataset.config=x"], "config is for hub"),
        (["dataset=jsonl", "dataset.validation_split=test", "dataset.validation_files=[a.jsonl]"], "choose one"),
        (["experiment=slimorca_then_openorca", "sources.openorca.validation_files=[a.parquet]"], "give all of them"),
        (["+dataset@sources.a=sample", "stages=[{mix: {a: 1}, epochs: 1}]"], "can't be sample"),
    ],
)
def test_settings_of_sources_that_do_not_fit_are_told(overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        compose_config("cfg_pretrain_instruct", overrides)


def test_a_hub_without_a_name_is_told() -> None:
    with pytest.raises(UsageError, match=r"dataset\.repo=OWNER/NAME"):
        opened("dataset=hub")


def test_without_a_hub_nothing_is_fetched(tmp_path: Path) -> None:
    for source in ("slimorca", "openorca"):
        with pytest.raises(UsageError, match=r"expected .* found none; check dataset\.data_dir"):
            opened(f"dataset={source}", f"dataset.data_dir={tmp_path}", "dataset.repo=null")


def staged(first: Path, second: Path, *overrides: str) -> PretrainInstructConfig:
    """The curriculum preset on stand-ins of both corpora, its files found locally."""
    folders = (f"sources.slimorca.data_dir={first}", f"sources.openorca.data_dir={second}")
    return compose_config(
        "cfg_pretrain_instruct",
        ["experiment=slimorca_then_openorca", f"dataset.tokenizer_path={MODEL}", "dataset.test_ratio=0.3", *folders, *overrides],
    )


def stand_ins(folder: Path) -> tuple[Path, Path]:
    """SlimOrca with rows 0 to 39 and OpenOrca with rows 20 to 79 of the same conversations."""
    table = orca_table(range(80))
    slim = [{"system": row["system_prompt"], "prompt": row["question"], "answer": row["response"]} for row in table.to_pylist()]
    write(folder / "slim/SlimOrca.jsonl", slim[:40])
    (folder / "open").mkdir()
    pyarrow.parquet.write_table(table.slice(20, 40), folder / "open/1M-GPT4-Augmented.parquet")
    pyarrow.parquet.write_table(table.slice(60, 20), folder / "open/3_5M-GPT3_5-Augmented.parquet")
    return folder / "slim", folder / "open"


def asked(corpus: TextCorpus | TextDataset | None) -> set[tuple[str, ...]]:
    assert corpus is not None
    return {tuple(turn.text for turn in corpus.conversation(i)) for i in range(len(corpus))}


def test_stages_read_their_sources_and_hold_out_the_same_conversations(tmp_path: Path) -> None:
    config = staged(*stand_ins(tmp_path))
    data = open_run_data(config, TOKENIZER, Template())
    assert data.test is not None and list(data.train.parts) == list(data.test.parts) == ["slimorca", "openorca"]
    first, second = data.train.parts.values()
    assert data.curriculum == Curriculum(0, (len(first), len(second)), (Stage(1, (len(first), 0)), Stage(1, (0, len(second)))))
    assert len(first) + len(data.test.parts["slimorca"]) == 40 and len(second) + len(data.test.parts["openorca"]) == 60
    both = asked(first) & asked(second), asked(data.test.parts["slimorca"]) & asked(data.test.parts["openorca"])
    assert all(both), "the sources must share rows of both splits for this test to mean anything"
    assert not asked(data.train) & asked(data.test), "what one source holds out, another would train on"
    again = open_run_split(config, TOKENIZER, Template(), "test")
    assert again.data_hash == data.test.data_hash != data.train.data_hash


def test_the_data_hash_covers_every_source(tmp_path: Path) -> None:
    folders = stand_ins(tmp_path)
    before = open_run_data(staged(*folders), TOKENIZER, Template()).train.data_hash
    part = open_run_data(staged(*folders, "sources.openorca.subset_size=20"), TOKENIZER, Template()).train.data_hash
    pyarrow.parquet.write_table(orca_table(range(90, 95)), folders[1] / "3_5M-GPT3_5-Augmented.parquet")
    assert len({before, part, open_run_data(staged(*folders), TOKENIZER, Template()).train.data_hash}) == 3


def test_a_stage_takes_sampled_shards_and_mixes_them(tmp_path: Path) -> None:
    folders = stand_ins(tmp_path)
    config = staged(*folders, "experiment=slimorca_then_openorca_sample", "stages.1.examples=50", "dataset.seed=1")
    data = open_run_data(config, TOKENIZER, Template())
    assert data.test is not None
    of_shard = len(data.train.parts["openorca"]) + len(data.test.parts["openorca"])
    assert of_shard in (20, 40), "one of two files"
    assert data.curriculum.stages[1] == Stage(1, (10, 40))


def test_a_single_source_is_a_run_of_one_stage(tmp_path: Path) -> None:
    write(tmp_path / "mine.jsonl", [chat(number) for number in range(40)])
    write(tmp_path / "mine-test.jsonl", [chat(number) for number in range(40, 45)])
    tokenizer = f"dataset.tokenizer_path={MODEL}"
    alone = ["dataset=jsonl", f"dataset.data_dir={tmp_path}", "epochs=3"]
    staged = ["+dataset@sources.mine=jsonl", f"sources.mine.data_dir={tmp_path}", "stages=[{mix: {mine: 1}, epochs: 3}]"]
    first, second = (
        open_run_data(compose_config("cfg_pretrain_instruct", [tokenizer, *overrides]), TOKENIZER, Template())
        for overrides in (alone, staged)
    )
    assert first.curriculum == second.curriculum == Curriculum.of_epochs(40, 0, 3)
    for data, name in ((first, "jsonl"), (second, "mine")):
        assert data.test is not None and list(data.train.parts) == [name] and len(data.test) == 5
        train, test = Source(compose_config("cfg_pretrain_instruct", [tokenizer, *alone]).dataset).open_splits(
            TOKENIZER, Template()
        )
        assert test is not None and (data.train.data_hash, data.test.data_hash) == (train.data_hash, test.data_hash)


def test_each_source_has_forms_of_its_own(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    write(one / "rows.jsonl", [{"pregunta": f"Question {n}?", "respuesta": f"Answer {n}."} for n in range(20)])
    write(other / "rows.jsonl", [{**chat(n), "notes": "left out"} for n in range(20)])
    sources = [f"+dataset@sources.{folder.name}=jsonl" for folder in (one, other)]
    sources += [f"sources.{folder.name}.data_dir={folder}" for folder in (one, other)]
    own = ["sources.one.fields={prompt: pregunta, response: respuesta}", "sources.other.ignore=[notes]"]
    stages = ["dataset.seq_len=64", "dataset.test_ratio=0.3", "dataset.default_system_prompt=null"]
    stages += ["stages=[{mix: {one: null, other: null}, epochs: 1}]"]
    data = open_run_data(compose_config("cfg_pretrain_instruct", [*sources, *own, *stages]), TOKENIZER, Template())
    [first, second] = data.train.parts.values()
    assert first.counts["forms"] == {"pair": 20} and second.counts["forms"] == {"sharegpt": 20}
    # Equal conversations, whatever their form.
    assert len(first) == len(second) > 10
    for index in range(len(first)):
        assert first[index].ids.tolist() == second[index].ids.tolist()
        assert first.conversation(index)[0].text == second.conversation(index)[0].text
    assert second.counts["ignored"] == {"notes": 20}
    with pytest.raises(UsageError, match=r"rows\.jsonl:1: notes: .*'left out'.*dataset\.fields.*dataset\.ignore=\[notes\]"):
        open_run_data(compose_config("cfg_pretrain_instruct", [*sources, own[0], *stages]), TOKENIZER, Template())


def test_raw_text_trains_whole_and_asks_nothing(tmp_path: Path) -> None:
    write(tmp_path / "SlimOrca.jsonl", [{"text": f"Story {n}. It ends."} for n in range(40)])
    train, test = open_data(tmp_path)
    assert test is not None and len(train) + len(test) == 40 and len(test) > 3
    assert train.counts["forms"] == {"text": 40}
    for index in range(len(train)):
        [turn], example = train.conversation(index), train[index]
        assert last_exchange((turn,)) is None
        assert example.ids.tolist() == [TOKENIZER.bos_id, *TOKENIZER.encode(turn.text), TOKENIZER.eos_id]
        assert example.supervised.tolist() == [False] + [True] * (len(example.ids) - 1)

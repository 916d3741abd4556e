"""Data sets, the order of examples for any number of workers, restarts, and padded batches."""

import json
import threading
from pathlib import Path
from typing import Any

import mistral_common
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from config.errors import UsageError
from dataset.text.conversation import Template, Turn, encode_conversation
from dataset.text.curriculum import Curriculum, permutation
from dataset.text.loader import Example, ExampleStream, TextCorpus, TextDataset, collate
from dataset.text.tokenizer import Tokenizer
from tests.conftest import load_file

TOKENIZER = Tokenizer(Path(mistral_common.__file__).parent / "data/tokenizer.model.v1")


def open_dataset(source: Path, **changes: Any) -> TextDataset:
    return load_file(source, TOKENIZER, **{"test_ratio": 0.3, "seed": 0, "default_system_prompt": "Help.", **changes})


def rows(count: int = 50) -> list[dict[str, Any]]:
    return [{"prompt": f"Q{number} \u2028é", "answer": f"A{number}", "family": number % 3} for number in range(count)]


@pytest.fixture(params=["data.jsonl", "data.jsonl.zst"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows()).encode()
    path = tmp_path / str(request.param)
    path.write_bytes(zstandard.ZstdCompressor().compress(content) if path.suffix == ".zst" else content)
    return path


def test_an_example_leads_back_to_its_row_and_conversation(source: Path) -> None:
    all_rows = rows()
    for split in ("train", "test"):
        dataset = open_dataset(source, split=split)
        for index in range(len(dataset)):
            original = dataset.row(index)
            line = int(dataset.place(index).rpartition(":")[2])
            assert dataset.place(index) == f"{source}:{line}" and original == all_rows[line - 1]
            turns = dataset.conversation(index)
            assert turns[0] == Turn("system", "Help.") and turns[-1].text == original["answer"]
            encoded, example = encode_conversation(turns, TOKENIZER, Template()), dataset[index]
            assert np.array_equal(example.ids, encoded.ids) and example.ids.dtype == np.int32
            assert np.array_equal(example.supervised, encoded.supervised) and example.supervised.dtype == np.bool_
            assert np.array_equal(example.segment, encoded.segment) and example.segment.dtype == np.int32
            assert example.turn_bytes == encoded.turn_bytes
        with pytest.raises(IndexError):
            dataset[len(dataset)]


def test_the_data_hash_tells_tokens_and_rows_and_not_the_place(source: Path, tmp_path: Path) -> None:
    train = open_dataset(source)
    (tmp_path / "elsewhere").mkdir()
    moved = tmp_path / "elsewhere" / source.name
    moved.write_bytes(source.read_bytes())
    assert open_dataset(moved).data_hash == train.data_hash
    others = [
        open_dataset(source, split="test"),
        open_dataset(source, seed=1),
        open_dataset(source, default_system_prompt=None),
        open_dataset(source, subset_size=7),
    ]
    assert len({train.data_hash, *(other.data_hash for other in others)}) == 5


def test_counts_are_of_the_split(source: Path) -> None:
    whole = {split: open_dataset(source, split=split) for split in ("train", "test")}
    lengths = {split: [len(dataset[i].ids) for i in range(len(dataset))] for split, dataset in whole.items()}
    seq_len = min(lengths["train"])  # the shortest kind of row and one id more still fit
    for split in ("train", "test"):
        counts = open_dataset(source, split=split, seq_len=seq_len).counts
        assert counts["kept"] == len(whole[split]) and counts["read"] == 50
        assert counts["truncated"] == sum(length > seq_len + 1 for length in lengths[split]) > 0


@given(st.integers(0, 200), st.integers(-5, 2**70), st.integers(0, 1000))
@settings(max_examples=100)
def test_an_epoch_is_a_permutation_of_its_own(n: int, seed: int, epoch: int) -> None:
    order = permutation(n, seed, epoch)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(n))
    assert np.array_equal(order, permutation(n, seed, epoch))


def test_epochs_and_seeds_differ_and_the_order_is_fixed_for_good() -> None:
    orders = [tuple(permutation(20, seed, epoch)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9
    assert permutation(8, 0, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]


def passes(dataset: Any, seed: int, epochs: int, workers: int, start: int = 0) -> ExampleStream:
    return ExampleStream(dataset, Curriculum.of_epochs(len(dataset), seed, epochs), workers, start)


def drawn(stream: ExampleStream) -> list[tuple[int, int, bytes]]:
    with stream:
        return [(draw.epoch, draw.example_id, example.ids.tobytes()) for draw, example in stream]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_order_is_that_of_the_permutations_for_any_worker_count_and_restart(source: Path, workers: int) -> None:
    dataset = open_dataset(source)
    size = len(dataset)
    expected = [(epoch, int(i), dataset[int(i)].ids.tobytes()) for epoch in range(3) for i in permutation(size, 5, epoch)]
    assert drawn(passes(dataset, 5, 3, workers)) == expected
    for start in (0, 1, size - 1, size, 2 * size + 3, 3 * size):
        assert drawn(passes(dataset, 5, 3, workers, start)) == expected[start:]
    first = passes(dataset, 5, 3, workers)
    taken = [next(first)[0] for _ in range(size + 4)]
    assert first.position == size + 4 and len(first) == len(expected) - first.position
    first.close()
    rest = passes(dataset, 5, 3, workers, first.position)
    ids = [draw.example_id for draw in (*taken, *(draw for draw, _ in rest))]
    assert ids == [example_id for _, example_id, _ in expected]


@given(st.integers(1, 40), st.integers(1, 3), st.lists(st.integers(1, 12), min_size=1), st.data())
@settings(max_examples=100)
def test_ranks_that_share_the_rows_read_every_example_once(n: int, epochs: int, steps: list[int], data: st.DataObject) -> None:
    """Each step admits so many examples; each rank takes its own and passes over the others'."""
    drawn: list[list[int]] = [[], []]
    streams = [passes(Counted(size=n), 3, epochs, 0) for _ in drawn]
    order: list[int] = []
    while len(streams[0]):
        free = min(steps[len(order) % len(steps)], len(streams[0]))
        of_first = data.draw(st.integers(0, free))
        for rank, stream in enumerate(streams):
            before, own, after = ((0, of_first, free - of_first), (of_first, free - of_first, 0))[rank]
            stream.skip(before)
            drawn[rank] += [next(stream)[1] for _ in range(own)]
            stream.skip(after)
        order += drawn[0][len(drawn[0]) - of_first :] + drawn[1][len(drawn[1]) - (free - of_first) :]
        assert streams[0].position == streams[1].position == len(order)
    assert order == [int(i) for epoch in range(epochs) for i in permutation(n, 3, epoch)]
    assert sum(stream._dataset.reads for stream in streams) == n * epochs  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="skip 1"):
        streams[0].skip(1)


def test_a_stream_that_reads_ahead_passes_over_examples_too() -> None:
    with passes(Counted(), 0, 1, 2) as stream:
        ids = [next(stream)[1]]
        stream.skip(100)
        ids.append(next(stream)[1])
    assert ids == [int(permutation(1000, 0, 0)[at]) for at in (0, 101)]


class Counted:
    """A data set that counts reads and fails at one example."""

    def __init__(self, failing: int | None = None, size: int = 1000) -> None:
        self.reads = 0
        self.failing = failing
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        self.reads += 1
        if index == self.failing:
            raise OSError("the disk is gone")
        return index


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("example-reader")]


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_reach_the_reader_at_their_place_and_leave_no_threads(workers: int) -> None:
    order = permutation(1000, 0, 0)
    stream = passes(Counted(failing=int(order[40])), 0, 1, workers)
    with pytest.raises(OSError, match="disk"):
        for count, (draw, _) in enumerate(stream):
            assert draw.example_id == order[count]
    assert stream.position == 40
    assert reader_threads() == []
    assert next(stream, None) is None


def test_reading_ahead_is_bounded_and_ends_with_the_stream() -> None:
    data = Counted()
    with pytest.raises(RuntimeError, match="training failed"), passes(data, 0, 100, 2) as stream:
        next(stream)
        raise RuntimeError("training failed")
    assert data.reads <= 32
    assert reader_threads() == []


def test_splits_of_several_sources_are_read_under_one_numbering(source: Path) -> None:
    parts = {"first": open_dataset(source), "second": open_dataset(source, split="test")}
    corpus = TextCorpus(parts)
    both = [(split, index) for split in parts.values() for index in range(len(split))]
    assert len(corpus) == len(both) == 50
    for index, (split, own) in enumerate(both):
        assert np.array_equal(corpus[index].ids, split[own].ids)
        assert corpus.row(index) == split.row(own) and corpus.conversation(index) == split.conversation(own)
    for index in (-1, 50):
        with pytest.raises(IndexError):
            corpus[index]
    assert TextCorpus({"only": parts["first"]}).data_hash == parts["first"].data_hash
    other_way = TextCorpus(dict(reversed(parts.items())))
    assert len({corpus.data_hash, other_way.data_hash, *(split.data_hash for split in parts.values())}) == 4


def test_a_stream_that_can_not_be_is_told(source: Path) -> None:
    dataset = open_dataset(source)
    with pytest.raises(UsageError, match="can't start at"):
        passes(dataset, 0, 1, 0, start=len(dataset) + 1)
    with pytest.raises(ValueError, match="doesn't fit"):
        ExampleStream(dataset, Curriculum.of_epochs(3, 0, 1), 0)


def example(ids: list[int], supervised: list[int]) -> Example:
    return Example(np.array(ids, np.int32), np.array(supervised, np.bool_), np.array([1, 1, 0, 0, 0][: len(ids)], np.int32), 3)


def test_collate_shifts_masks_and_pads() -> None:
    batch = collate([example([1, 7, 8, 9, 2], [0, 0, 1, 1, 1]), example([1, 5, 2], [0, 0, 1])], 0, 1)
    assert batch["inputs"].tolist() == [[1, 7, 8, 9], [1, 5, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 8, 9, 2], [-100, 2, -100, -100]]
    assert batch["segment"].tolist() == [[1, 1, 0, 0], [1, 1, 0, 0]]
    assert batch["lengths"].tolist() == [4, 2]
    everything = collate([example([1, 7, 8, 9, 2], [0, 0, 1, 1, 1]), example([1, 5, 2], [0, 0, 1])], 0, 1, "all")
    assert everything["labels"].tolist() == [[7, 8, 9, 2], [5, 2, -100, -100]]


@pytest.mark.parametrize(("multiple", "width"), [(1, 4), (4, 4), (3, 6), (64, 64)])
def test_collate_rounds_the_width_up(multiple: int, width: int) -> None:
    batch = collate([example([1, 7, 8, 9, 2], [0, 0, 1, 1, 1])], 6, multiple)
    assert batch["inputs"].shape == batch["labels"].shape == batch["segment"].shape == (1, width)
    assert (batch["inputs"][0, 4:] == 6).all() and (batch["labels"][0, 4:] == -100).all()

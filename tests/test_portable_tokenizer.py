"""transformers' ids of a conversation are those of training, whatever the text (dataset/text/portable_tokenizer.py)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from config.errors import UsageError
from dataset.text.conversation import Template, Turn, encode_conversation, encode_prompt, question
from dataset.text.portable_tokenizer import BOS, EOS, chat_template, portable_tokenizer
from dataset.text.tokenizer import Tokenizer
from tests.tokenizer_files import byte_fallback, byte_level, sentencepiece_model, unigram, with_everything_on

NASTY = ("<s>", "</s>", "[USER]\n", "[ASSISTANT]\n", "[SYSTEM]\n", BOS, EOS, "\ufdd0|", "\ufdd0", "\ufdd1", "\u2581", "  ")
texts = st.lists(st.text() | st.sampled_from(NASTY), max_size=4).map("".join)
KINDS: dict[str, Callable[[], bytes]] = {
    "sentencepiece": lambda: sentencepiece_model(
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False
    ),
    "sentencepiece, no blank before a text": lambda: sentencepiece_model(
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
    ),
    "byte level": byte_level,
    "byte level, prefix, NFC": lambda: byte_level(normalizers.NFC(), prefix=True),
    "byte fallback": byte_fallback,
    "unigram": unigram,
    "everything on": with_everything_on,
}


def loaded(tokenizer: Tokenizer, folder: Path, default_system: str | None = None) -> Any:
    (folder / "tokenizer.json").write_text(portable_tokenizer(tokenizer, Template()))
    fast = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), bos_token=BOS, eos_token=EOS)
    fast.chat_template = chat_template(Template(), default_system)
    return fast


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    tokenizer = Tokenizer.from_bytes(KINDS[request.param]())
    return tokenizer, loaded(tokenizer, tmp_path_factory.mktemp("tokenizer"))


conversations = st.lists(st.tuples(st.sampled_from(("system", "user", "assistant")), texts), min_size=1, max_size=6)


def check_ids(tokenizer: Tokenizer, fast: Any, said: list[Any], asked: str) -> None:
    messages = [{"role": role, "content": text} for role, text in said]
    turns = [Turn(role, text) for role, text in said]
    assert fast.apply_chat_template(messages, return_dict=False) == encode_conversation(turns, tokenizer, Template()).ids.tolist()
    messages.append({"role": "user", "content": asked})
    opened = fast.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert opened == encode_prompt([*turns, Turn("user", asked)], tokenizer, Template()).ids.tolist()


@pytest.fixture(scope="module")
def tiny_pair(tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    return tiny_tokenizer, loaded(tiny_tokenizer, tmp_path_factory.mktemp("tokenizer"))


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(conversations, texts)
def test_ids_of_conversations_are_those_of_training(tiny_pair: tuple[Tokenizer, Any], said: list[Any], asked: str) -> None:
    check_ids(*tiny_pair, said, asked)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(conversations, texts)
def test_so_they_are_with_every_kind_of_tokenizer(pair: tuple[Tokenizer, Any], said: list[Any], asked: str) -> None:
    check_ids(*pair, said, asked)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(exclude_categories=("Cs", "Cn"))))
def test_text_by_itself_has_its_ids_behind_bos_and_comes_back(pair: tuple[Tokenizer, Any], text: str) -> None:
    tokenizer, fast = pair
    ids = tokenizer.encode(text)
    assert fast(text).input_ids == [tokenizer.bos_id, *ids]
    assert fast.decode([*ids, tokenizer.eos_id], skip_special_tokens=True) == tokenizer.decode(ids)


def test_a_conversation_opens_with_the_default_system_turn_unless_it_has_its_own(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    fast = loaded(tiny_tokenizer, tmp_path, "Be \ufdd0 blue.")
    user = {"role": "user", "content": "Red"}
    for messages in ([user], [{"role": "system", "content": " "}, user], [{"role": "system", "content": "Be red."}, user]):
        turns = question([Turn(message["role"], message["content"]) for message in messages], "Be \ufdd0 blue.")
        opened = fast.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert opened == encode_prompt(turns, tiny_tokenizer, Template()).ids.tolist()


def test_an_unknown_role_is_told(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    with pytest.raises(Exception, match="expected the roles system, user and assistant, found tool"):
        loaded(tiny_tokenizer, tmp_path).apply_chat_template([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize("options", [{}, {"model_type": "bpe"}, {"model_type": "bpe", "byte_fallback": True}])
def test_a_tokenizer_without_an_equal_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"no equal tokenizer\.json"):
        portable_tokenizer(Tokenizer.from_bytes(sentencepiece_model(**options)), Template())

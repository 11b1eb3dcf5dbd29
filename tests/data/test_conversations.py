"""Conversations as a corpus: what is read, which tokens an assistant says, how blocks are filled."""

import json
from itertools import pairwise

import datasets
import numpy as np
import pytest
from chats import CHATML, MARKED, REFUSING, THINKING, chat, chat_tokenizer, chats, write_rows
from families import one_of
from hypothesis import given, settings
from hypothesis import strategies as st

from glmd.data.batches import Collate
from glmd.data.chats import ConversationDataset, conversation_texts, pack, packing_of
from glmd.data.conversations import ConversationReader, tokens_within
from glmd.data.token_store import MARKS, build_token_store, open_token_store
from glmd.errors import ConfigError, DataError, RunError


def encoded(path, template: str = CHATML, **options):
    """The tokenizer, the conversations of a file, and these as tokens."""
    tokenizer = chat_tokenizer(template)
    reader = ConversationReader(tokenizer, "messages", **options)
    conversations = list(reader.read([str(path)]))
    return tokenizer, conversations, reader.encode(conversations)


def said(tokenizer, each) -> list[str]:
    """What an assistant says of a conversation, run by run."""
    borders = np.flatnonzero(np.diff(each.is_assistant, prepend=False, append=False))
    return [tokenizer.decode(each.ids[a:b]) for a, b in zip(borders[::2], borders[1::2], strict=True)]


@pytest.fixture
def path(tmp_path):
    return write_rows(tmp_path / "chats.jsonl", chats())


@pytest.mark.parametrize("template", one_of([CHATML, MARKED, THINKING]))
def test_tokens_are_those_of_the_chat_template(template, path):
    tokenizer, conversations, found = encoded(path, template)
    for each, ours in zip(conversations, found, strict=True):
        theirs = tokenizer.apply_chat_template(each.messages, tokenize=True, return_dict=True)["input_ids"]
        assert ours.ids.tolist() == theirs


def test_an_assistant_says_its_answers_and_the_ends_of_its_turns_and_nothing_else(path):
    tokenizer, conversations, found = encoded(path)
    for each, ours in zip(conversations, found, strict=True):
        answers = [message["content"] for message in each.messages if message["role"] == "assistant"]
        assert said(tokenizer, ours) == [f"{answer}<|im_end|>" for answer in answers]


def test_marks_of_a_template_and_the_proof_without_marks_find_the_same_tokens(path):
    for ours, theirs in zip(encoded(path, CHATML)[2], encoded(path, MARKED)[2], strict=True):
        assert np.array_equal(ours.is_assistant, theirs.is_assistant)


def test_marked_tokens_are_those_that_transformers_marks(path):
    tokenizer, conversations, found = encoded(path, MARKED)
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    for each, ours in zip(conversations, found, strict=True):
        assert ours.is_assistant.tolist() == tokenizer.apply_chat_template(each.messages, **options)["assistant_masks"]


def test_a_template_that_leaves_out_earlier_thoughts_has_those_answers_without_them(tmp_path):
    """As Qwen3's: an earlier turn alone has thoughts, within the conversation it has none."""
    row = chat("one", "<think>\nhm\n</think>\n\nblue", "two", "<think>\nso\n</think>\n\nred")
    tokenizer, _, (found,) = encoded(write_rows(tmp_path / "a.jsonl", [row, chat("x", "y")][:1]), THINKING)
    assert said(tokenizer, found) == ["blue<|im_end|>", "<think>\nso\n</think>\n\nred<|im_end|>"]


# What begins an answer here is no part of a conversation in which it was given: as DeepSeek's <think>.
PROMPTING = CHATML.replace("'<|im_start|>assistant\n' }}{% endif", "'<|im_start|>assistant\n<think>\n' }}{% endif")
# Another answer alone than within the conversation.
COUNTING = CHATML.replace("m.content + '<|im_end|>'", "m.content + messages|length|string + '<|im_end|>'")
# An answer that spells an end and says the same again ends at two places, where its thoughts are left out.
TWICE = "blue<|im_end|>\nblue"


@pytest.mark.parametrize(
    ("template", "answer"),
    [(PROMPTING, "blue"), (COUNTING, "blue"), (THINKING, TWICE)],
    ids=["prompt", "other", "twice"],
)
def test_turns_that_cannot_be_told_are_refused_by_row(template, answer, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [chat("one", answer, "two", "red")])
    with pytest.raises(DataError) as error:
        encoded(path, template)
    assert f"{path}:1: the chat template writes message 2 otherwise within the conversation" in str(error.value)
    assert "{% generation %} marks" in str(error.value) and "data.loss_on=all" in str(error.value)
    _, _, (found,) = encoded(path, template, loss_on="all")
    assert not found.is_assistant.any() and len(found.ids)


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer()


@settings(max_examples=40)
@given(
    text=st.text("ab \n", max_size=12), spans=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=2)
)
def test_a_token_is_an_assistants_where_one_of_its_characters_is(tokenizer, text, spans):
    made = tokenizer(text, return_offsets_mapping=True)
    turns = [(min(span), max(span)) for span in spans]
    ends = np.cumsum([0, *(len(tokenizer.decode([i])) for i in made["input_ids"])])
    characters = {place for first, stop in turns for place in range(first, stop)}
    expected = [bool(characters & {*range(a, b)}) for a, b in pairwise(ends)]
    assert tokens_within(made["offset_mapping"], turns).tolist() == expected


FAULTS = [
    ({"text": "a"}, "field 'messages' is missing; known: text"),
    ({"message": []}, "field 'messages' is missing; did you mean message?"),
    ({"messages": []}, "field 'messages' must be a list of messages, got []"),
    ({"messages": "hello"}, "field 'messages' must be a list of messages, got 'hello'"),
    ({"messages": ["hello"]}, "message 1 must have role and content, got 'hello'"),
    ({"messages": [{"from": "human", "value": "a"}]}, "role of message 1 must be text; it has from, value"),
    ({"messages": [{"role": 1, "content": "a"}]}, "role of message 1 must be text; got 1"),
    ({"messages": [{"role": "user", "content": None}]}, "content of message 1 must be text; got None"),
    ({"messages": [{"role": "user", "content": "a"}]}, "no message has the role assistant, only user"),
    ({**chat("a", "b"), "tools": 3}, "field 'tools' must be a list, got 3"),
    ({**chat("a", "b"), "tools": "{"}, "field 'tools' is no JSON"),
    (chat("a", "b", system="s"), "the chat template does not render it (TemplateError: System role not supported)"),
]


@pytest.mark.parametrize(("row", "message"), FAULTS, ids=[message[:40] for _, message in FAULTS])
def test_a_row_that_is_no_conversation_is_refused_by_file_and_line(row, message, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [chat("a", "b"), row])
    reader = ConversationReader(chat_tokenizer(REFUSING), "messages")
    with pytest.raises(DataError) as error:
        reader.require([str(path)])
    assert f"{path}:2: {message}" in str(error.value) and "\n" not in str(error.value)


def test_an_answer_at_the_beginning_is_refused(tmp_path):
    row = {"messages": [{"role": "assistant", "content": "hello"}]}
    with pytest.raises(DataError, match="begins with an answer"):
        encoded(write_rows(tmp_path / "a.jsonl", [row]))


def test_a_template_that_writes_no_content_is_refused(tmp_path):
    """One for contents in parts leaves texts out in silence."""
    parts = CHATML.replace("m.content +", "(m.content | selectattr('text') | join) +")
    with pytest.raises(DataError, match="writes the content of no message"):
        encoded(write_rows(tmp_path / "a.jsonl", [chat("a word", "b word")]), parts)


def test_a_tokenizer_without_a_chat_template_is_refused():
    with pytest.raises(ConfigError, match="NAME: its tokenizer has no chat template"):
        ConversationReader(chat_tokenizer(None), "messages", name="NAME")


def test_a_text_file_has_no_conversations(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(DataError, match=r"a\.txt: a line of text has no fields"):
        ConversationReader(chat_tokenizer(), "messages").require([str(tmp_path)])


def test_rows_of_parquet_and_of_the_hub_are_read_as_those_of_jsonl(path, tmp_path):
    rows = chats()
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows" / "chats.parquet"))
    expected = encoded(path)[2]
    for ours, theirs in zip(encoded(tmp_path / "rows")[2], expected, strict=True):
        assert np.array_equal(ours.ids, theirs.ids) and np.array_equal(ours.is_assistant, theirs.is_assistant)


def test_tools_are_told_to_the_template_as_a_list_or_as_json(tmp_path):
    template = "{% if tools %}{{ tools[0].name }}{% endif %}" + CHATML
    rows = [{**chat("a", "b"), "tools": given} for given in ([{"name": "adder"}], json.dumps([{"name": "adder"}]))]
    tokenizer, _, found = encoded(write_rows(tmp_path / "a.jsonl", rows), template)
    for each in found:
        assert tokenizer.decode(each.ids).startswith("adder<|im_start|>")
        assert said(tokenizer, each) == ["b<|im_end|>"]


# --- Blocks -------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=80), st.integers(1, 20))
def test_every_conversation_is_in_one_block_and_whole_where_it_fits(lengths, max_length):
    packing = pack(np.array(lengths), max_length)
    blocks = [packing.members(i).tolist() for i in range(len(packing.ends))]
    assert sorted(number for block in blocks for number in block) == [*range(len(lengths))]
    assert all(sum(min(lengths[i], max_length) for i in block) <= max_length for block in blocks)
    assert [block[0] for block in blocks] == sorted(block[0] for block in blocks)
    assert all(block == sorted(block) for block in blocks)


def test_blocks_are_nearly_full():
    lengths = np.random.default_rng(0).integers(20, 300, 2000)
    packing = pack(lengths, 512)
    assert lengths.sum() / (512 * len(packing.ends)) > 0.93


def test_without_packing_a_block_is_a_conversation():
    packing = pack(np.array([3, 9, 2]), 8, packing=False)
    assert [packing.members(i).tolist() for i in range(3)] == [[0], [1], [2]]


def stored(folder, path, template: str = CHATML, **options):
    tokenizer = chat_tokenizer(template)
    reader = ConversationReader(tokenizer, "messages", **options)
    return tokenizer, build_token_store(folder, [str(path)], tokenizer, conversations=reader)


def dataset(store, *, max_length: int = 64, packing: bool = True, loss_on="assistant", by_role: bool = False):
    packed = packing_of(store, max_length, packing)
    blocks = range(len(packed.ends))
    return ConversationDataset(
        store, max_length=max_length, blocks=blocks, packing=packed, loss_on=loss_on, by_role=by_role
    )


@pytest.mark.parametrize("loss_on", one_of(["assistant", "all"]))
def test_a_batch_is_made_of_whole_conversations_with_the_loss_before_the_tokens_that_count(loss_on, path, tmp_path):
    """Against a loop over conversations one at a time."""
    tokenizer, store = stored(tmp_path / "store", path)
    _, _, conversations = encoded(path)
    data = dataset(store, loss_on=loss_on, by_role=True)
    assert store.num_tokens == sum(len(each.ids) for each in conversations) and len(data) < len(conversations)
    batch = Collate(tokenizer.pad_token_id)(data.__getitems__([(0, i) for i in range(len(data))]))
    number_that_predict = 0
    for row in range(len(data)):
        start = 0
        for number in data.packing.members(row):
            ids, is_assistant = conversations[number].ids[:64], conversations[number].is_assistant[:64]
            span = slice(start, start + len(ids))
            following = [*is_assistant[1:].tolist(), False]
            wanted = following if loss_on == "assistant" else [True] * (len(ids) - 1) + [False]
            assert batch["input_ids"][row, span].tolist() == ids.tolist()
            assert batch["text_positions"][row, span].tolist() == [*range(len(ids))]
            assert batch["predicts"][row, span].tolist() == wanted
            assert batch["by_assistant"][row, span].bool().tolist() == following
            start, number_that_predict = start + len(ids), number_that_predict + sum(wanted)
        assert not batch["predicts"][row, start:].any() and not batch["attention_mask"][row, start:].any()
        assert data.lengths[row] == start == batch["attention_mask"][row].sum()
    assert len(batch["positions"]) == data.num_tokens == number_that_predict
    assert data.truncated() == sum(len(each.ids) > 64 for each in conversations) > 0
    alone = data[0, 3]
    again = Collate(tokenizer.pad_token_id)([alone])
    assert again["predicts"][0].tolist() == batch["predicts"][3, : len(alone["input_ids"])].tolist()


def test_texts_of_held_out_conversations_are_those_of_the_template(path, tmp_path):
    tokenizer, store = stored(tmp_path / "store", path)
    _, conversations, _ = encoded(path)
    data = dataset(store, max_length=256)
    found = dict(zip(data.numbers.tolist(), conversation_texts(data, tokenizer), strict=True))
    for number, each in enumerate(conversations):
        text, turns = found[number]
        assert text == tokenizer.apply_chat_template(each.messages, tokenize=False)
        answers = [message["content"] for message in each.messages if message["role"] == "assistant"]
        assert [text[first:stop] for first, stop in turns] == [f"{answer}<|im_end|>" for answer in answers]


def test_a_store_of_conversations_is_reused_and_another_one_is_refused(path, tmp_path):
    folder = tmp_path / "store"
    tokenizer, store = stored(folder, path)
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert stored(folder, path)[1].manifest == store.manifest
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(RunError, match="made from another chat_template"):
        stored(folder, path, MARKED)
    with pytest.raises(RunError, match=r"made from another loss_on \('assistant', now 'all'\)"):
        stored(folder, path, loss_on="all")
    with pytest.raises(RunError, match=r"made from another text_field \(None, now 'text'\)"):
        build_token_store(folder, [str(path)], tokenizer)


@pytest.mark.parametrize(
    "damage", [lambda marks: marks[:-1], lambda marks: b"\1" + marks[1:]], ids=["short", "changed"]
)
def test_damaged_marks_are_made_again(damage, path, tmp_path):
    store = stored(tmp_path / "store", path)[1]
    marks = store.folder / MARKS
    whole = marks.read_bytes()
    marks.write_bytes(damage(whole))
    stored(tmp_path / "store", path)
    assert marks.read_bytes() == whole and open_token_store(tmp_path / "store").has_roles

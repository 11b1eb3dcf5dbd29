"""Bits per byte: a code for the bytes of a text, comparable between vocabularies."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from families import FAMILIES, SMALL, TEXT, sentences

from glmd.cli import main
from glmd.commands.evaluate import evaluate_text
from glmd.data.blocks import BlockDataset, block_texts
from glmd.data.corpus import read_documents
from glmd.data.token_store import build_token_store
from glmd.evaluation.bits_per_byte import naming_bits, score_text, text_bits, windows
from glmd.vocabulary.build import build_vocabulary
from glmd.vocabulary.slicing import slice_model
from glmd.vocabulary.tokenizer import compress_tokenizer, load_tokenizer, save_tokenizer, stock_tokenizer

DECODERS = ["GPT2LMHeadModel", "LlamaForCausalLM", "MistralForCausalLM"]
TEXTS = [TEXT, "a", "under the river " * 20, "  two\tspaces, 猫!\nand a line"]


def load(models, name):
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / name)
    return transformers.AutoModelForCausalLM.from_pretrained(models / name).double().eval(), tokenizer


def compressed(models, name, share=0.9):
    """A student with fewer tokens, cut from the model without training."""
    model, tokenizer = load(models, name)
    counts = np.bincount(np.concatenate(tokenizer(sentences())["input_ids"]), minlength=len(tokenizer))
    vocabulary = build_vocabulary(
        tokenizer, model.get_input_embeddings().weight, counts, keep_ratio=share, mapping="euclidean"
    )
    return slice_model(model, vocabulary), compress_tokenizer(tokenizer, vocabulary), vocabulary


@pytest.mark.parametrize("name", DECODERS)
def test_every_token_is_scored_once_as_by_the_plainest_twin(name, models):
    """The twin runs the model again for every token, on what stands before it."""
    model, tokenizer = load(models, name)
    start, room = [tokenizer.bos_token_id or tokenizer.eos_token_id], 15
    encoded = tokenizer(TEXTS, add_special_tokens=False)["input_ids"]
    assert max(map(len, encoded)) > 3 * room > min(map(len, encoded))
    expected, step = 0.0, room - room // 2
    for ids in encoded:
        for i in range(len(ids)):
            begin = 0 if i < room else step * math.ceil((i + 1 - room) / step)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([start + ids[begin:i]])).logits[0, -1]
            expected -= logits.log_softmax(-1)[ids[i]].item() / math.log(2)
    got = text_bits(model, encoded, start=start, max_length=16, accelerator=Accelerator(cpu=True))
    assert got == pytest.approx(expected, rel=1e-12)
    assert score_text(model, tokenizer, TEXTS, max_length=16, accelerator=Accelerator(cpu=True)) == {
        "tokens_per_byte": sum(map(len, encoded)) / len("".join(TEXTS).encode()),
        "bits_per_byte": pytest.approx(expected / len("".join(TEXTS).encode()), rel=1e-12),
        "restored": 1.0,
    }


@pytest.mark.parametrize("room", [1, 2, 7, 8])
def test_windows_lose_no_token_and_score_none_twice(room):
    for length in range(40):
        found = list(windows(length, room))
        scored = [i for _, first, end in found for i in range(first, end)]
        assert scored == list(range(length))
        assert all(end - begin <= room for begin, _, end in found)
        assert all(first - begin == room // 2 for begin, first, _ in found[1:])


def test_ranks_share_the_windows_and_sum_to_the_whole(models, monkeypatch):
    model, tokenizer = load(models, DECODERS[1])
    ids = tokenizer(TEXTS, add_special_tokens=False)["input_ids"]
    whole = text_bits(model, ids, start=[0], max_length=12, accelerator=Accelerator(cpu=True))
    monkeypatch.setattr("glmd.evaluation.bits_per_byte.gather_object", lambda parts: parts)
    parts = [
        text_bits(
            model, ids, start=[0], max_length=12,
            accelerator=SimpleNamespace(process_index=rank, num_processes=3, device=torch.device("cpu")),
        )
        for rank in range(3)
    ]  # fmt: skip
    assert min(parts) > 0 and sum(parts) == pytest.approx(whole, rel=1e-12)


def test_the_names_of_merged_tokens_are_a_code():
    """For every row of mapped tokens the codes of all that it may have been fit together (Kraft), and nearly fill."""
    token_map = np.array([0, 1, 2, 0, 0, 1])  # 3 and 4 were dropped onto 0, 5 onto 1
    is_dropped = np.array([False, False, False, True, True, True])
    members = [np.flatnonzero(token_map == i) for i in range(3)]
    for mapped in itertools.product(range(3), repeat=4):
        rows = itertools.product(*(members[i] for i in mapped))
        shares = [2 ** -naming_bits(token_map, is_dropped, np.array(row)) for row in rows]
        assert sum(shares) == pytest.approx(1.0, abs=1e-9)
    assert naming_bits(token_map, is_dropped, np.array([2, 2])) == 0, "where nothing was merged nothing is named"


@pytest.mark.parametrize("name", DECODERS)
def test_merging_words_makes_no_student_better(name, models):
    """A student of one guess for all: the fewer tokens it has the cheaper the mapped ids alone, and the text is not."""
    student, tokenizer, vocabulary = compressed(models, name)
    for parameter in student.parameters():
        parameter.data.zero_()
    texts = [TEXT, " ".join(sentences(20))]
    scores = score_text(student, tokenizer, texts, max_length=32, accelerator=Accelerator(cpu=True))
    size = len("".join(texts).encode())
    source = np.concatenate(tokenizer.source_tokenizer(texts, add_special_tokens=False)["input_ids"])
    is_dropped = np.isin(np.arange(vocabulary.source_size), vocabulary.dropped_ids)
    naming = naming_bits(vocabulary.token_map, is_dropped, source)
    assert scores["dropped"] == pytest.approx(is_dropped[source].mean()) and 0 < scores["dropped"] < 1
    assert scores["mapped_bits_per_byte"] == pytest.approx(len(source) * math.log2(vocabulary.size) / size)
    assert scores["naming_bits_per_byte"] == pytest.approx(naming / size) and naming > 0
    assert scores["exact_bits_per_byte"] == pytest.approx(
        scores["mapped_bits_per_byte"] + scores["naming_bits_per_byte"]
    )
    tokens = len(np.concatenate(stock_tokenizer(tokenizer)(texts, add_special_tokens=False)["input_ids"]))
    assert scores["bits_per_byte"] == pytest.approx(tokens * math.log2(vocabulary.size) / size)
    assert scores["tokens_per_byte"] * size == pytest.approx(tokens) and tokens > len(source)
    assert scores["restored"] == 1.0


def test_text_of_kept_tokens_costs_the_same_with_both_tokenizers(models):
    student, tokenizer, vocabulary = compressed(models, DECODERS[0])
    source = tokenizer.source_tokenizer
    texts = [
        text for text in sentences(60)
        if all(map(vocabulary.is_kept, source(text, add_special_tokens=False)["input_ids"]))
    ]  # fmt: skip
    assert len(texts) > 5
    scores = score_text(student, tokenizer, texts, max_length=32, accelerator=Accelerator(cpu=True))
    assert scores["dropped"] == 0 and scores["mapped_bits_per_byte"] == pytest.approx(scores["bits_per_byte"])


def test_the_ordinary_tokenizer_is_what_stock_transformers_makes_of_the_folder(models, tmp_path):
    for name in DECODERS:
        _, tokenizer, _ = compressed(models, name)
        save_tokenizer(tokenizer, tmp_path / name)
        stock = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / name)
        assert stock_tokenizer(tokenizer)(TEXTS)["input_ids"] == stock(TEXTS)["input_ids"]
        assert stock(TEXTS)["input_ids"] != tokenizer(TEXTS)["input_ids"]


def test_a_tokenizer_that_loses_letters_says_so():
    tokenizer = FAMILIES["xlm-r"]()
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), **SMALL)
    model = transformers.LlamaForCausalLM(config)
    scores = score_text(model, tokenizer, ["the cat", "猫犬"], max_length=16, accelerator=Accelerator(cpu=True))
    assert scores["restored"] == 0.5


def test_text_of_blocks_is_the_documents_of_the_corpus(models, tmp_path):
    (tmp_path / "corpus.txt").write_text("the cat\nsang\n\nüber the river\n\nlight\n", encoding="utf-8")
    for name in DECODERS:
        tokenizer = load_tokenizer(models / name)
        store = build_token_store(tmp_path / name, [str(tmp_path / "corpus.txt")], tokenizer)
        data = BlockDataset(store, tokenizer, max_length=9, blocks=range(1), masking=None)
        data.blocks = range(store.num_blocks(data.block_length))
        assert block_texts(data, tokenizer) == list(read_documents([str(tmp_path / "corpus.txt")]))


@pytest.mark.slow
def test_a_folder_on_text_files_by_command(models, tmp_path, capsys):
    text = models / "corpus.txt"
    assert main(["evaluate", str(models / DECODERS[0]), "--text", str(text), "--max-length", "32"]) == 0
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert list(printed) == ["documents", "bytes", "max_length", "tokens_per_byte", "bits_per_byte", "restored"]
    (document,) = read_documents([str(text)])
    assert printed["bytes"] == str(len(document.encode()))
    model, tokenizer = load(models, DECODERS[0])
    scores = score_text(model, tokenizer, [document], max_length=32, accelerator=Accelerator(cpu=True))
    assert float(printed["bits_per_byte"]) == pytest.approx(scores["bits_per_byte"], abs=1e-4)
    student = tmp_path / "student"
    small = [str(models / DECODERS[0]), str(student), "--corpus", str(text), "--keep-ratio", "0.9"]
    assert main(["compress", *small]) == 0
    scores = evaluate_text(str(student), [str(text)], max_length=32)
    assert scores["bytes"] == int(printed["bytes"]), "another tokenizer, the same bytes"
    assert scores["tokens_per_byte"] > float(printed["tokens_per_byte"]) and "exact_bits_per_byte" in scores


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["GPT2LMHeadModel", "--text", "corpus.txt", "--task", "RTE"], "--task has no effect beside --text"),
        (["GPT2LMHeadModel", "--text", "corpus.txt", "--batch-size", "2"], "--batch-size has no effect beside --text"),
        (["GPT2LMHeadModel"], "--data is missing; give --task and --data, or --text or --references"),
        (["GPT2LMHeadModel", "--task", "RTE"], "--data is missing; give --task and --data, or --text"),
        (["RobertaForMaskedLM", "--text", "corpus.txt"], "holds a RobertaForMaskedLM; bits per byte need a causal LM"),
        (
            ["GPT2LMHeadModel", "--text", "corpus.txt", "--max-length", "65"],
            "65 tokens, but it has 64 positions; give --max-length 64",
        ),
        (["GPT2LMHeadModel", "--text", "absent.txt"], "absent.txt: no such file"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_model_is_loaded(arguments, says, models, capsys, monkeypatch):
    monkeypatch.setattr("glmd.commands.evaluate.load_model_as_saved", lambda _: pytest.fail("loaded"))
    monkeypatch.chdir(models)
    assert main(["evaluate", *arguments]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.real
def test_a_real_byte_level_vocabulary_gives_the_text_back_at_a_quarter(shared):
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared / "data/tokenizers/smollm2")
    texts = list(itertools.islice(read_documents([str(shared / "data/corpus/wikitext2_valid.txt")]), 2))
    counts = np.bincount(np.concatenate(tokenizer(texts[:1])["input_ids"]), minlength=len(tokenizer))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), **{**SMALL, "tie_word_embeddings": True})
    model = transformers.LlamaForCausalLM(config)
    vocabulary = build_vocabulary(
        tokenizer, model.get_input_embeddings().weight, counts, keep_ratio=0.25, mapping="cosine"
    )
    student = compress_tokenizer(tokenizer, vocabulary)
    accelerator = Accelerator(cpu=True)
    full = score_text(model, tokenizer, texts, max_length=512, accelerator=accelerator)
    quarter = score_text(slice_model(model, vocabulary), student, texts, max_length=512, accelerator=accelerator)
    assert full["restored"] == quarter["restored"] == 1
    assert quarter["tokens_per_byte"] > full["tokens_per_byte"]
    assert 0.01 < quarter["dropped"] < 0.5 and quarter["exact_bits_per_byte"] > quarter["mapped_bits_per_byte"]

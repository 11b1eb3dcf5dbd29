"""`glmd compress` for every family of tokenizers and kind of head: fewer tokens, the same logits, a stock folder."""

import pytest
import torch
import transformers
from families import CLASSES, one_of

from glmd.cli import main
from glmd.vocabulary.tokenizer import load_tokenizer


def logits_of(folder, name: str, ids: torch.Tensor) -> torch.Tensor:
    model = getattr(transformers, name).from_pretrained(folder).eval()
    decoder = {"decoder_input_ids": ids} if "ConditionalGeneration" in name else {}
    with torch.no_grad():
        return model(input_ids=ids, **decoder)[0]


@pytest.mark.parametrize("name", CLASSES)
def test_every_kind_of_model_keeps_its_output_on_kept_tokens(name, models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("glmd.commands.compress.check_exports", lambda folders: None)
    folder, source = tmp_path / "small", transformers.AutoTokenizer.from_pretrained(models / name)
    arguments = ["compress", str(models / name), str(folder), "--corpus", str(models / "corpus.txt")]
    assert main([*arguments, "--keep-ratio", "0.85"]) == 0, capsys.readouterr().err
    tokenizer = load_tokenizer(folder)
    assert tokenizer.is_exact and len(tokenizer) < len(source)
    kept = source.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    ids = torch.arange(len(tokenizer) - 40, len(tokenizer))[None]
    expected = logits_of(models / name, name, torch.tensor(kept)[ids])
    if expected.shape[-1] == len(source):
        expected = expected[..., kept]
    torch.testing.assert_close(logits_of(folder, name, ids), expected)
    text = "the quickest cat sang über 猫 mountains"
    source_ids = source(text)["input_ids"]
    assert tokenizer(text)["input_ids"] == [tokenizer.token_map[i] for i in source_ids]


def test_the_summary_counts_unknown_tokens_apart(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("glmd.commands.compress.check_exports", lambda folders: None)
    (tmp_path / "foreign.txt").write_text("東 京 語\n\n" * 40)
    arguments = ["compress", str(tiny.teacher), str(tmp_path / "small"), "--corpus", str(tmp_path / "foreign.txt")]
    assert main([*arguments, "--keep-ratio", "0.7"]) == 0
    captured = capsys.readouterr()
    assert "(0.00% of the corpus, 100.00% of it unknown to the tokenizer)" in captured.out


@pytest.mark.slow
def test_every_compressed_folder_opens_without_glmd(models, tmp_path, monkeypatch):
    from glmd.models.export import check_exports

    proved = []
    monkeypatch.setattr("glmd.commands.compress.check_exports", proved.extend)
    for name in CLASSES:
        arguments = ["compress", str(models / name), str(tmp_path / name), "--corpus", str(models / "corpus.txt")]
        assert main([*arguments, "--size", str(len(load_tokenizer(models / name)) - 20)]) == 0
    assert len(proved) == len(CLASSES)
    check_exports(proved)  # one process for all of them


def test_a_model_type_without_an_ordinary_tokenizer_opens_by_the_general_class(models, tmp_path, monkeypatch):
    """AutoTokenizer has none for llama: it asks for trust, or refuses; glmd and the general class need neither."""
    monkeypatch.setattr("glmd.commands.compress.check_exports", lambda folders: None)
    folder, name = tmp_path / "small", "LlamaForCausalLM"
    arguments = ["compress", str(models / name), str(folder), "--corpus", str(models / "corpus.txt"), "--size", "370"]
    assert main(arguments) == 0
    plain, exact = transformers.PreTrainedTokenizerFast.from_pretrained(folder), load_tokenizer(folder)
    text = "the quickest cat"
    assert len(plain) == len(exact) == 370 and not hasattr(plain, "is_exact")
    assert plain(text)["input_ids"] == exact.backend_tokenizer.encode(text).ids
    remote = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert remote(text)["input_ids"] == exact(text)["input_ids"]


@pytest.mark.slow
@pytest.mark.parametrize("casting", one_of(["cloze", "head"]))
@pytest.mark.parametrize("name", one_of(["RobertaForMaskedLM", "XLMRobertaForMaskedLM"]))
def test_masked_lms_of_other_families_distil_to_the_end(name, casting, models, tiny, trusting, tmp_path):
    """Byte pairs and scores in place of WordPiece, positions that count from the pad token on."""
    from glmd.commands.evaluate import evaluate_folder
    from glmd.pipeline.run import run

    results = run(
        tiny.config(
            tmp_path / "run",
            f"teacher={models / name}",
            f"data.corpus={models / 'corpus.txt'}",
            f"casting={casting}",
            "vocabulary.keep_ratio=0.95",
            "tasks.RTE.max_length=48",
            *(["tasks.RTE.definition=" + str(_roberta_rte(tmp_path))] if casting == "cloze" else []),
        )
    )
    row = next(row for row in results["rows"] if row["stage"] == "task_soft_labels")
    student = tmp_path / "run/tasks/RTE/seed-0/task_soft_labels/student"
    task = str(_roberta_rte(tmp_path)) if casting == "cloze" else "RTE"
    scores = evaluate_folder(str(student), task, str(tiny.superglue), "val", max_length=48, batch_size=5)
    assert scores["accuracy"] == pytest.approx(row["metrics"]["accuracy"])
    assert scores["casting"] == casting


def _roberta_rte(folder):
    path = folder / "rte.yaml"
    path.write_text(
        "name: RTE\nfolder: RTE\nhub_name: rte\nfields: [premise, hypothesis]\ntext: '{premise}'\n"
        "text_pair: '{hypothesis}'\nlabels: [entailment, not_entailment]\nmetrics: [accuracy]\nmax_length: 48\n"
        "cloze: {text: 'light {blank} .', text_pair: '{premise} {hypothesis}', verbalizers: [dark, green]}\n"
    )
    return path


def test_words_of_a_file_shares_of_corpora_and_the_output_matrix_shape_a_compressed_vocabulary(
    models, tmp_path, monkeypatch
):
    monkeypatch.setattr("glmd.commands.compress.check_exports", lambda folders: None)
    (tmp_path / "words.txt").write_text("unlike\n")
    rare = tmp_path / "rare.txt"
    rare.write_text("mountains papers stones\n")

    def kept(*arguments) -> tuple[set[str], list[int]]:
        output = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        place = ["compress", str(models / "MistralForCausalLM"), str(output), "--size", "300"]
        assert main([*place, "--corpus", str(models / "corpus.txt"), *arguments]) == 0
        tokenizer = load_tokenizer(output)
        return set(tokenizer.get_vocab()), tokenizer.token_map

    plain, map_of_input = kept()
    assert not plain.issuperset(kept("--keep-words-file", str(tmp_path / "words.txt"))[0])
    assert "▁unlike" in kept("--keep-words-file", str(tmp_path / "words.txt"))[0]
    common, rarer = (kept(str(rare), "--corpus-weights", *shares)[0] for shares in (("1", "0.001"), ("0.001", "1")))
    assert "▁papers" in rarer and rarer != common
    assert kept("--similarity", "output")[1] != map_of_input


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("GPT2LMHeadModel", ["--size", "100"], "vocabulary: 100 of 398 tokens would be kept, but 258 must be"),
        ("T5EncoderModel", ["--size", "100", "--selection", "free"], "selection free has no effect: tokens of Unigram"),
        ("LlamaForCausalLM", ["--size", "380", "--keep-words", ""], "keep_words: the tokenizer does not know ''"),
        ("LlamaForCausalLM", ["--size", "380", "--corpus-weights", "1"], "--corpus-weights: 1 numbers for 1 sources"),
        (
            "LlamaForCausalLM",
            ["--size", "380", "--keep-words-file", "absent"],
            "--keep-words-file: absent cannot be read",
        ),
        ("AlbertForMaskedLM", ["--size", "100", "--keep-words", "Ω"], "keep_words: the tokenizer does not know 'Ω'"),
    ],
)
def test_what_cannot_be_compressed_is_refused_before_text_and_model_are_read(
    name, arguments, says, models, tmp_path, monkeypatch, capsys
):
    for function in ("build_token_store", "load_model_as_saved"):
        monkeypatch.setattr(f"glmd.commands.compress.{function}", lambda *_, **__: pytest.fail("read"))
    assert (
        main(
            ["compress", str(models / name), str(tmp_path / "out"), "--corpus", str(models / "corpus.txt"), *arguments]
        )
        == 2
    )
    assert says in capsys.readouterr().err and not (tmp_path / "out").exists()

"""What lies beside a model, and the texts that its folder writes itself, survive a smaller vocabulary or are named."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from families import FAMILIES, save_encoder

from glmd.commands.compress import compress_model
from glmd.commands.verify import verify_folder
from glmd.errors import ModelError
from glmd.models.companions import find_companions
from glmd.models.export import card_text, opens_plainly
from glmd.vocabulary.build import build_vocabulary
from glmd.vocabulary.selection import must_keep_ids, template_texts
from glmd.vocabulary.tokenizer import compress_tokenizer, load_tokenizer, require_reloadable, save_tokenizer


def compressed(tokenizer: Any, keep_ratio: float = 0.85, **options: Any) -> Any:
    """The tokenizer with so many of its tokens, all counted alike."""
    vectors = np.random.default_rng(0).normal(size=(len(tokenizer), 4))
    counts = np.arange(len(tokenizer))[::-1].copy()  # what stands last is dropped first
    vocabulary = build_vocabulary(tokenizer, vectors, counts, keep_ratio=keep_ratio, mapping="cosine", **options)
    return compress_tokenizer(tokenizer, vocabulary)


@pytest.fixture
def sentence_encoder(tiny: Any, tmp_path: Path) -> Path:
    """A BERT without a head, in the form of sentence-transformers, with pooling of the first token and a prompt."""
    return save_encoder(tmp_path / "encoder", tiny.teacher, pooling="cls_token", prompts={"query": "bcd: "})


def test_a_sentence_encoder_keeps_its_modules_its_pooling_and_its_prompts(
    sentence_encoder: Path, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glmd.commands.compress.check_exports", lambda folders: None)
    (sentence_encoder / "notes.md").write_text("by hand")
    text = compress_model(str(sentence_encoder), tmp_path / "small", corpus=[str(tiny.corpus)], keep_ratio=0.6)
    assert "not carried along: notes.md" in text
    for name in (
        "modules.json",
        "1_Pooling/config.json",
        "config_sentence_transformers.json",
        "sentence_bert_config.json",
    ):
        assert (tmp_path / "small" / name).read_bytes() == (sentence_encoder / name).read_bytes()
    assert (tmp_path / "small/2_Normalize").is_dir()
    source, student = load_tokenizer(sentence_encoder), load_tokenizer(tmp_path / "small")
    prompt = source.tokenize("bcd: ")
    assert student.tokenize("bcd: ") == prompt and set(prompt) <= set(student.get_vocab())
    monkeypatch.setattr("glmd.commands.verify.check_exports", lambda folders: None)
    assert all(check.problem is None for check in verify_folder(tmp_path / "small"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('[{"idx": 0, "path": "0_BoW", "type": "sentence_transformers.models.BoW"}]', "names a BoW, which may depend"),
        ('[{"idx": 0, "path": "../x", "type": "a.Pooling"}]', "names '../x', which is outside the folder"),
        ('{"idx": 0}', "not a list of modules"),
        ("nonsense", "cannot be read"),
    ],
)
def test_modules_that_cannot_be_carried_are_refused(sentence_encoder: Path, rows: str, message: str) -> None:
    (sentence_encoder / "modules.json").write_text(rows)
    with pytest.raises(ModelError, match=message):
        find_companions(str(sentence_encoder))


def test_a_plain_model_has_no_companions_and_leaves_nothing_behind(models: Path) -> None:
    for folder in (path for path in models.iterdir() if path.is_dir()):
        found = find_companions(str(folder))
        assert not (found.files or found.folders or found.texts or found.left_behind), folder


def test_what_a_chat_template_writes_is_kept() -> None:
    tokenizer = FAMILIES["gpt2"]()
    tokenizer.chat_template = (
        "{% set begin = 'over ' %}{% for m in messages %}{{ begin }}mountains "
        "{{ m['content'] }}{{ ' birds' + eos_token }}"
        "{% endfor %}"
    )
    assert set(template_texts(tokenizer)) == {"over ", "mountains ", " birds"}
    student, messages = compressed(tokenizer), [{"role": "user", "content": "a"}]
    ids = student.apply_chat_template(messages, tokenize=True, return_dict=False)
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert student.convert_ids_to_tokens(ids) == tokenizer.tokenize(rendered)
    tokenizer.chat_template = None
    assert must_keep_ids(tokenizer) < must_keep_ids(tokenizer, texts=["mountains"])


def test_named_chat_templates_are_read_and_a_broken_one_writes_nothing() -> None:
    tokenizer = FAMILIES["gpt2"]()
    tokenizer.chat_template = {"default": "one {{ messages }}", "tool_use": "two {% generation %}x{% endgeneration %}"}
    assert set(template_texts(tokenizer)) == {"one ", "two x"}
    tokenizer.chat_template = "{% for %}"
    assert template_texts(tokenizer) == []


def test_named_chat_templates_pass_verify_and_a_changed_one_does_not(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("compress", "verify"):
        monkeypatch.setattr(f"glmd.commands.{module}.check_exports", lambda folders: None)
    source, output = tmp_path / "source", tmp_path / "small"
    shutil.copytree(models / "LlamaForCausalLM", source)
    tokenizer = load_tokenizer(source)
    tokenizer.chat_template = {"default": "{{ messages[0]['content'] }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(source)
    compress_model(str(source), output, corpus=[str(models / "corpus.txt")], keep_ratio=0.85)
    assert [check.problem for check in verify_folder(output) if check.problem] == []
    assert load_tokenizer(output).chat_template == tokenizer.chat_template
    real = load_tokenizer

    def forgetful(folder: Path | str) -> Any:
        loaded = real(folder)
        loaded.chat_template = loaded.chat_template if Path(folder) == output else "another"
        return loaded

    monkeypatch.setattr("glmd.commands.verify.load_tokenizer", forgetful)
    problems = [check.problem for check in verify_folder(output) if check.problem]
    assert problems == ["saving it again changes its chat template"]


@pytest.mark.parametrize("flags", [(True, True), (True, False), (False, True)])
def test_frame_flags_are_those_of_the_source_and_work_after_saving(flags: tuple[bool, bool], tmp_path: Path) -> None:
    source = FAMILIES["llama2"]()
    source.add_bos_token, source.add_eos_token = flags
    student = compressed(source)
    save_tokenizer(student, tmp_path)
    for each in (student, load_tokenizer(tmp_path)):
        assert (each.add_bos_token, each.add_eos_token) == flags
        assert each("a b")["input_ids"] == [each.token_map[i] for i in source("a b")["input_ids"]]
        each.add_eos_token = False
        source.add_eos_token = False
        assert each.add_bos_token is flags[0]
        assert each("a b")["input_ids"] == [each.token_map[i] for i in source("a b")["input_ids"]]
        source.add_eos_token = flags[1]


def test_a_frame_that_no_flag_describes_is_left_alone() -> None:
    student = compressed(FAMILIES["roberta"]())
    assert not student.add_bos_token and not student.add_eos_token
    begin, *_, end = student("a")["input_ids"]
    assert (begin, end) == (student.bos_token_id, student.eos_token_id)


def test_a_tokenizer_that_does_not_come_back_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = FAMILIES["gpt2"]()
    require_reloadable(tokenizer)
    other = FAMILIES["roberta"]()
    monkeypatch.setattr("glmd.vocabulary.tokenizer.load_tokenizer", lambda folder: other)
    with pytest.raises(ModelError, match="in another way after it was saved and opened"):
        require_reloadable(tokenizer)
    monkeypatch.setattr("glmd.vocabulary.tokenizer.save_tokenizer", lambda *_: 1 / 0)
    with pytest.raises(ModelError, match="cannot be saved and opened again: division"):
        require_reloadable(tokenizer)


def test_the_card_says_what_a_family_needs_to_open(models: Path) -> None:
    from glmd.models.export import ModelCard

    assert opens_plainly(transformers.BertConfig()) and not opens_plainly(transformers.LlamaConfig())
    card = ModelCard("t", "", "s", {}, exact_tokenizer=True, auto_class="AutoModelForCausalLM")
    assert "the folder opens too" in " ".join(card_text(card).split())
    from dataclasses import replace

    told = " ".join(card_text(replace(card, opens_plainly=False)).split())
    assert "pipelines refuse the folder" in told and "glmd export --kind stock" in told


def test_code_of_a_tokenizer_is_refused_without_a_question(tmp_path: Path, tiny: Any) -> None:
    shutil.copytree(tiny.teacher, tmp_path / "folder")
    path = tmp_path / "folder/tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    path.write_text(json.dumps(settings))
    config = json.loads((tmp_path / "folder/config.json").read_text())
    llama = transformers.LlamaConfig(vocab_size=config["vocab_size"], hidden_size=16, num_attention_heads=2)
    llama.save_pretrained(tmp_path / "folder")
    (tmp_path / "folder/own.py").write_text("raise SystemExit('it was run')")
    with pytest.raises(ModelError, match="its tokenizer brings Python code of its own, which is not run"):
        load_tokenizer(tmp_path / "folder")


def test_plain_settings_of_a_tokenizer_are_kept() -> None:
    source = FAMILIES["gpt2"]()
    source.init_kwargs |= {
        "use_default_system_prompt": False,
        "errors": "replace",
        "vocab_file": "/elsewhere",
        "n": None,
    }
    settings = compressed(source).init_kwargs
    assert settings["use_default_system_prompt"] is False and settings["errors"] == "replace"
    assert "vocab_file" not in settings and "n" not in settings

"""Small tokenizers of every family, trained on the spot: what a test says of one it says of all."""

import json
import string
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from glmd.config import RunConfig
from glmd.config_file import load_config
from glmd.models.heads import LMKind
from glmd.tasks.forms import TaskForm, task_form
from glmd.tasks.tasks import load_task
from glmd.vocabulary.slicing import slice_model
from glmd.vocabulary.vocabulary import Vocabulary

TEXT = (
    "the cat dog bird river mountain sing sang singing running light lighter dark green over under blue stone paper "
    "quick quickest slow slowly unlike likely river's can't 2024 1999 wörter über naïve 猫 mountains papers stones"
)
WORDS = TEXT.split()


def sentences(count: int = 400) -> list[str]:
    rng = np.random.default_rng(7)
    ranks = rng.zipf(1.3, (count, 9)) % len(WORDS)
    return [" ".join(WORDS[rank] for rank in row) + "." for row in ranks]


def byte_level_bpe() -> PreTrainedTokenizerFast:
    """As GPT-2's: no normalizer, no special token in a text, a space belongs to its word."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    _train(backend, trainers.BpeTrainer(vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return _wrapped(backend, eos_token="<|end|>", unk_token="<|end|>", pad_token="<|pad|>")


def roberta_bpe() -> PreTrainedTokenizerFast:
    """As RoBERTa's: special tokens come first, the mask swallows the space before it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", AddedToken("<mask>", lstrip=True, special=True)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(backend, trainers.BpeTrainer(vocab_size=425, initial_alphabet=alphabet, special_tokens=special))
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    names = {"bos": "<s>", "cls": "<s>", "pad": "<pad>", "eos": "</s>", "sep": "</s>", "unk": "<unk>"}
    mask = AddedToken("<mask>", lstrip=True, special=True)
    return _wrapped(backend, **{f"{name}_token": token for name, token in names.items()}, mask_token=mask)


def llama3_bpe() -> PreTrainedTokenizerFast:
    """As Llama 3's: whole words are looked up before merging, a chat template, a token at the beginning."""
    backend = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(r"'s|\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    _train(backend, trainers.BpeTrainer(vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    backend.add_special_tokens(["<|begin|>", "<|end|>", "<|user|>"])
    begin = [("<|begin|>", backend.token_to_id("<|begin|>"))]
    template = processors.TemplateProcessing("<|begin|> $A", "<|begin|> $A <|begin|> $B:1", begin)
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    tokenizer = _wrapped(backend, bos_token="<|begin|>", eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = (
        "<|begin|>{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
        "{% endgeneration %}{% else %}<|user|>{{ m.content }}{% endif %}{% endfor %}"
    )
    return tokenizer


def llama2_bpe() -> PreTrainedTokenizerFast:
    """As Llama 2's: no pre-tokenizer, spaces are letters, what is unknown is spelled in bytes."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # Merges within words, as sentencepiece learns them.
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    _train(backend, trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"]))
    state = json.loads(backend.to_str())
    learned = list(state["model"]["vocab"])
    first, rest = learned[:3], learned[3:]
    entries = [*first, *(f"<0x{byte:02X}>" for byte in range(256)), *rest]
    state["model"]["vocab"] = {token: i for i, token in enumerate(entries)}
    state["pre_tokenizer"] = None
    backend = Tokenizer.from_str(json.dumps(state))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    template = processors.TemplateProcessing("<s> $A", "<s> $A <s>:1 $B:1", [("<s>", 1)])
    backend.post_processor = template
    return _wrapped(backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>")


def unigram() -> PreTrainedTokenizerFast:
    """As XLM-R's: scores instead of merges, an unknown token, ids are places in a list."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    backend = _unigram(vocab_size=150, special_tokens=special, unk_token="<unk>")
    template = processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> </s> $B </s>", [("<s>", 0), ("</s>", 2)])
    backend.post_processor = template
    names = {"bos": "<s>", "cls": "<s>", "pad": "<pad>", "eos": "</s>", "sep": "</s>", "unk": "<unk>"}
    mask = AddedToken("<mask>", lstrip=True, special=True)
    return _wrapped(backend, **{f"{name}_token": token for name, token in names.items()}, mask_token=mask)


def t5_unigram() -> PreTrainedTokenizerFast:
    """As T5's: sentinels beyond the model's own list, an end and no beginning."""
    backend = _unigram(vocab_size=150, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>")
    backend.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    sentinels = [f"<extra_id_{i}>" for i in range(5)]
    return _wrapped(backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", extra_special_tokens=sentinels)


def _unigram(**options: object) -> Tokenizer:
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    _train(backend, trainers.UnigramTrainer(initial_alphabet=list(string.ascii_lowercase), **options))
    return backend


def _train(backend: Tokenizer, trainer: trainers.Trainer) -> None:
    trainer.show_progress = False
    backend.train_from_iterator(sentences(), trainer)


def _wrapped(backend: Tokenizer, **special: object) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=48, **special)


FAMILIES = {
    "gpt2": byte_level_bpe,
    "roberta": roberta_bpe,
    "llama3": llama3_bpe,
    "llama2": llama2_bpe,
    "xlm-r": unigram,
    "t5": t5_unigram,
}


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64}  # fmt: skip
CLASSES = {
    "GPT2LMHeadModel": ("gpt2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "RobertaForMaskedLM": ("roberta", {**SMALL, "max_position_embeddings": 66}),
    "RobertaForSequenceClassification": ("roberta", {**SMALL, "max_position_embeddings": 66}),
    "ModernBertForMaskedLM": ("roberta", {**SMALL, "max_position_embeddings": 64}),
    "BartForConditionalGeneration": ("roberta", BART),
    "LlamaForCausalLM": ("llama3", {**SMALL, "tie_word_embeddings": True}),
    "MistralForCausalLM": ("llama2", {**SMALL, "num_key_value_heads": 2}),
    "Gemma2ForCausalLM": (
        "llama2",
        {**SMALL, "num_key_value_heads": 1, "head_dim": 8, "final_logit_softcapping": 1.0},
    ),
    "CohereForCausalLM": ("llama3", {**SMALL, "num_key_value_heads": 1, "logit_scale": 4.0}),
    "GraniteForCausalLM": ("gpt2", {**SMALL, "num_key_value_heads": 1, "logits_scaling": 0.25}),
    "XLMRobertaForMaskedLM": ("xlm-r", {**SMALL, "max_position_embeddings": 66}),
    "AlbertForMaskedLM": ("xlm-r", {**SMALL, "embedding_size": 8}),
    "T5ForConditionalGeneration": ("t5", T5),
    "T5EncoderModel": ("t5", T5),
}


def make_models(root: Path) -> Path:
    """A folder with model and tokenizer of each class, their ids agreeing, and a corpus."""
    (root / "corpus.txt").write_text("\n".join(sentences()), encoding="utf-8")
    for name, (family, settings) in CLASSES.items():
        tokenizer, model_class = FAMILIES[family](), getattr(transformers, name)
        roles = ("pad", "bos", "eos", "cls", "sep", "mask")
        ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in roles}
        config_class = model_class.config_class
        known = config_class().to_dict()
        ids = {key: value for key, value in ids.items() if key in known}
        if "decoder_start_token_id" in known:
            ids["decoder_start_token_id"] = tokenizer.eos_token_id
        if "forced_eos_token_id" in known:
            ids["forced_eos_token_id"] = tokenizer.eos_token_id
        torch.manual_seed(0)
        model_class(config_class(vocab_size=len(tokenizer), **settings, **ids)).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def class_form() -> TaskForm:
    """A task of two classes and two texts, under a classification head."""
    return task_form(load_task("RTE"), kind="masked")


def cloze_form(*verbalizers: str, kind: LMKind = "masked", mean: bool = False) -> TaskForm:
    """A task as a cloze: filled by these words for its two labels, or without them by each example's candidates."""
    task = load_task("RTE" if verbalizers else "COPA", "cloze")
    cloze = replace(task.cloze, verbalizers=verbalizers, mean_over_tokens=mean)
    return task_form(replace(task, cloze=cloze), kind=kind)


def short_run(output: Path, method: str, teacher: Path, task: dict[str, Any], *overrides: str) -> RunConfig:
    """Four steps of one task under a teacher that predicts no words."""
    stage = {"max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "logging_steps": 1}
    values = {
        "output_dir": str(output),
        "method": method,
        "teacher": str(teacher),
        "student": {"num_hidden_layers": 1},
        "vocabulary": {"keep_ratio": 0.7},
        "tasks": {"own": task},
        "task_soft_labels": stage,
        "controls": {"hard_labels": False},
    }
    return load_config(values, list(overrides))


def curve(output: Path) -> list[float]:
    """The logged losses of a run."""
    rows = map(json.loads, (output / "log.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def near_student(teacher: Any, tokenizer: Any) -> tuple[Any, Vocabulary]:
    """The teacher without three of its tokens and with other weights, and the vocabulary that it has."""
    kept = np.setdiff1d(np.arange(len(tokenizer)), [300, 301, 302])
    token_map = np.zeros(len(tokenizer), dtype=int)
    token_map[kept] = np.arange(len(kept))
    vocabulary = Vocabulary(kept, token_map)
    torch.manual_seed(1)
    student = slice_model(teacher, vocabulary)
    for parameter in student.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return student, vocabulary


def one_of(cases: Iterable[Any]) -> list[Any]:
    """The cases of a law of which one is enough in every run; the others are left to `.ci/full`."""
    first, *others = cases
    return [first, *(pytest.param(each, marks=pytest.mark.full) for each in others)]


def save_encoder(folder: Path, teacher: Path, *, pooling: str | None, prompts: Any = None, default: Any = None) -> Path:
    """A BERT without a head, of drawn weights and a teacher's config and tokenizer, as sentence-transformers has it.

    pooling: its name there; None: without the files that say it.
    """
    import transformers

    torch.manual_seed(3)
    transformers.BertModel(transformers.AutoConfig.from_pretrained(teacher)).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(teacher).save_pretrained(folder)
    if pooling is None:
        return folder
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    rows = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    told = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": False, f"pooling_mode_{pooling}": True}
    for path, value in (
        ("modules.json", rows),
        ("1_Pooling/config.json", told),
        ("config_sentence_transformers.json", {"prompts": prompts or {}, "default_prompt_name": default}),
        ("sentence_bert_config.json", {"max_seq_length": 64}),
    ):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(json.dumps(value))
    (folder / "2_Normalize").mkdir()
    return folder

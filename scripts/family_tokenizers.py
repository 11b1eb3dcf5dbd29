"""Small tokenizers of the families' own classes, trained on some texts.

    make = byte_level(QWEN, special=("<|endoftext|>",), class_name="Qwen2Tokenizer", eos_token="<|endoftext|>")
    make(folder, texts)      # writes the files that are published

Each has the pre-tokenizer, special tokens and frame that it is given, and the class that the published folder names.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AddedToken
from transformers.tokenization_utils_tokenizers import TokenizersBackend

TOKENS = 800
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3, QWEN = (f"{CONTRACTION}|{WORDS % digits}" for digits in (r"\p{N}{1,3}", r"\p{N}"))
_CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]%s[\p{Ll}\p{Lm}\p{Lo}\p{M}]%s" + CONTRACTION + "?"
O200K = "|".join(
    (_CASED % ("*", "+"), _CASED % ("+", "*"), r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
)


def save(tokenizer: Any, folder: Path, class_name: str | None = None, **settings: Any) -> None:
    """The tokenizer's files; class_name and settings as the published tokenizer_config.json has them."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    saved |= ({"tokenizer_class": class_name} if class_name else {}) | settings
    path.write_text(json.dumps(saved, indent=2, ensure_ascii=False), encoding="utf-8")


def byte_level(
    pattern: str | None = None,
    *,
    special: tuple[str | AddedToken, ...] = (),
    plain: tuple[str, ...] = (),
    frame: tuple[list[str], list[str]] = ([], []),
    class_name: str = "PreTrainedTokenizerFast",
    nfc: bool = False,
    **options: Any,
) -> Callable[[Path, list[str]], None]:
    """Byte-level BPE, whose words the pattern finds (GPT-2's where none is given).

    special, plain: added tokens, the latter found in text too but no special ones. frame: tokens before and behind.
    options: roles and settings, and of the model `ignore_merges`.
    """

    def make(folder: Path, texts: list[str]) -> None:
        backend = Tokenizer(models.BPE(ignore_merges=options.get("ignore_merges", False)))
        backend.normalizer = normalizers.NFC() if nfc else None
        whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
        backend.pre_tokenizer = (
            pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), whole]) if pattern else whole
        )
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=TOKENS, initial_alphabet=alphabet, show_progress=False)
        backend.train_from_iterator(texts, trainer)
        backend.add_special_tokens(list(special))
        backend.add_tokens([AddedToken(each, normalized=False) for each in plain])
        before, behind = frame
        steps: list[Any] = [processors.ByteLevel(trim_offsets=False)]
        if before or behind:
            ids = [(name, backend.token_to_id(name)) for name in dict.fromkeys(before + behind)]
            pair = [*before, "$A", *behind, *(f"{name}:1" for name in before if not behind), "$B:1"]
            pair += [f"{name}:1" for name in behind]
            steps.append(processors.TemplateProcessing([*before, "$A", *behind], pair, ids))
        backend.post_processor = processors.Sequence(steps) if len(steps) > 1 else steps[0]
        settings = {name: value for name, value in options.items() if name != "ignore_merges"}
        settings.setdefault("model_input_names", ["input_ids", "attention_mask"])
        tokenizer = TokenizersBackend(tokenizer_object=backend, clean_up_tokenization_spaces=False, **settings)
        save(tokenizer, folder, class_name)

    return make


def sentencepiece_model(path: Path, texts: list[str], **options: Any) -> None:
    """A `.model` of sentencepiece, trained on the texts, of as many pieces as they are good for."""
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=file,
            hard_vocab_limit=False,
            minloglevel=2,
            num_threads=1,
            **options,
        )


def spm_bpe(*, class_name: str = "LlamaTokenizer", **options: Any) -> Callable[[Path, list[str]], None]:
    """SentencePiece BPE with byte fallback, as Llama 2's, Mistral's and Phi-3's: read from its tokenizer.model."""
    special, settings = options.pop("added", ()), options

    def make(folder: Path, texts: list[str]) -> None:
        spm = {"model_type": "bpe", "byte_fallback": True, "split_digits": True, "vocab_size": TOKENS}
        sentencepiece_model(
            folder / "tokenizer.model", texts, normalization_rule_name="identity", remove_extra_whitespaces=False, **spm
        )
        tokenizer = transformers.LlamaTokenizer.from_pretrained(folder, **settings)
        tokenizer.add_tokens(list(special))
        save(tokenizer, folder, class_name)

    return make


def gemma(**roles: Any) -> Callable[[Path, list[str]], None]:
    """Gemma's: no space before a text, runs of line breaks and mark-up as tokens of their own."""
    extra = roles.pop("beyond", ())

    def make(folder: Path, texts: list[str]) -> None:
        unused = [f"<unused{i}>" for i in range(6)]
        symbols = ["<mask>", *unused, "<start_of_turn>", "<end_of_turn>", "\n", "\n\n", "▁▁", "▁▁▁", "<table>"]
        sentencepiece_model(
            folder / "tokenizer.model", texts, model_type="bpe", byte_fallback=True, split_digits=True,
            vocab_size=TOKENS, normalization_rule_name="identity", remove_extra_whitespaces=False,
            add_dummy_prefix=False, pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>",
            bos_piece="<bos>", user_defined_symbols=symbols,
        )  # fmt: skip
        options = {"model_max_length": 512, "add_bos_token": True, "clean_up_tokenization_spaces": False}
        tokenizer = transformers.GemmaTokenizer.from_pretrained(folder, **{**options, **roles})
        tokenizer.add_special_tokens({"extra_special_tokens": list(extra)}) if extra else None
        (folder / "tokenizer.model").unlink()  # the published folder's tokenizer.json is what is read
        save(tokenizer, folder, "GemmaTokenizer")

    return make


def unigram(class_name: str, file: str, *, keep_json: bool = True, **options: Any) -> Callable[[Path, list[str]], None]:
    """SentencePiece Unigram, read by its class from the `.model` file that is published."""
    settings = options.pop("settings", {})

    def make(folder: Path, texts: list[str]) -> None:
        sentencepiece_model(folder / file, texts, model_type="unigram", vocab_size=TOKENS, **options)
        tokenizer = getattr(transformers, class_name).from_pretrained(folder, **settings)
        save(tokenizer, folder, class_name)
        if not keep_json:
            (folder / "tokenizer.json").unlink()

    return make


def wordpiece(folder: Path, texts: list[str]) -> None:
    """ELECTRA's, which is BERT's."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=TOKENS, special_tokens=special, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    tokenizer = transformers.BertTokenizer(vocab=backend.get_vocab(), do_lower_case=True, model_max_length=512)
    save(tokenizer, folder, "ElectraTokenizer")

"""The tokenizer of a student whose vocabulary was compressed. This file travels inside every exported folder.

Text is cut by the teacher's tokenizer, then each id is mapped onto a kept one, so that student and teacher see
the same positions. Everything else (decoding, length, special tokens, padding) is a stock tokenizer over the
kept tokens. Without this file the folder loads as that stock tokenizer, which cuts rare words differently.

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
"""

import copy
import hashlib
import json
import os
from typing import Any

from tokenizers import Tokenizer
from transformers import BatchEncoding
from transformers.tokenization_utils_tokenizers import VOCAB_FILES_NAMES, TokenizersBackend

SOURCE_TOKENIZER_FILE = "source_tokenizer.json"
TOKEN_MAP_FILE = "token_map.json"
TOKEN_MAP_VERSION = 1
# Arguments about files and backends: the private source tokenizer gets a backend of its own.
_NOT_FOR_SOURCE = ("tokenizer_file", "tokenizer_object", "added_tokens_decoder", "chat_template", "backend")
# How a folder was opened; from_pretrained passes it on, and it would be saved as if it were a setting.
LOADING_ONLY = (
    "is_local",
    "local_files_only",
    "trust_remote_code",
    "revision",
    "cache_dir",
    "token",
    "_commit_hash",
)
# What a user may set after loading; the source tokenizer must cut and pad by the same values.
_SHARED_SETTINGS = (
    "padding_side",
    "truncation_side",
    "model_max_length",
    "model_input_names",
    "split_special_tokens",
    "deprecation_warnings",
    "_pad_token_type_id",
    "_special_tokens_map",
    "_extra_special_tokens",
)


class GlmdTokenizer(TokenizersBackend):
    """A source tokenizer followed by a map of ids.

    tokenizer_file, tokenizer_object: the student's backend, K kept tokens with ids 0..K-1.
    source_tokenizer_file, source_tokenizer_object: the teacher's backend, V tokens.
    token_map_file, token_map: student id of each source id, V numbers.
    """

    vocab_files_names = {  # noqa: RUF012 - the base class declares it so
        **VOCAB_FILES_NAMES,
        "source_tokenizer_file": SOURCE_TOKENIZER_FILE,
        "token_map_file": TOKEN_MAP_FILE,
    }

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        # A subclass with its own __init__ would otherwise be rebuilt from vocabulary and merges alone.
        return kwargs

    def __init__(
        self,
        *args: Any,
        source_tokenizer_file: str | None = None,
        source_tokenizer_object: Tokenizer | None = None,
        token_map_file: str | None = None,
        token_map: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.pop("vocab_file", None)
        if token_map is None or source_tokenizer_object is None:
            source_tokenizer_object, token_map = _read_source(source_tokenizer_file, token_map_file)
        source_kwargs = {name: value for name, value in kwargs.items() if name not in _NOT_FOR_SOURCE}
        self._source = TokenizersBackend(tokenizer_object=source_tokenizer_object, **copy.deepcopy(source_kwargs))
        self._token_map = [int(i) for i in token_map]
        super().__init__(*args, **kwargs)
        for name in LOADING_ONLY:
            self.init_kwargs.pop(name, None)
        # As transformers itself would write it for a class that came with a folder.
        self._auto_map = {"AutoTokenizer": (f"tokenization_glmd.{type(self).__name__}", None)}
        self._extend_map()
        self._read_frame()

    def _read_frame(self) -> None:
        """Set add_bos_token and add_eos_token to what tokenizer.json does: transformers saves neither beside it."""
        bos, eos = ([] if i is None else [i] for i in (self.bos_token_id, self.eos_token_id))
        single, pair = (self.backend_tokenizer.encode(*texts).ids for texts in (("",), ("", "")))
        for flags in ((True, True), (True, False), (False, True)):
            framed = bos * flags[0] + eos * flags[1]
            if framed and single == framed and pair == framed * 2:
                for tokenizer in (self, self._source):
                    # Their setters would each write the post-processor anew.
                    object.__setattr__(tokenizer, "_add_bos_token", flags[0] and bool(bos))
                    object.__setattr__(tokenizer, "_add_eos_token", flags[1] and bool(eos))
                return

    @property
    def is_exact(self) -> bool:
        """True: text is cut as the teacher cuts it. The stock tokenizer of the same folder lacks this property."""
        return True

    @property
    def token_map(self) -> list[int]:
        """Student id of every source id, tokens added later included."""
        return list(self._token_map)

    @property
    def source_tokenizer(self) -> TokenizersBackend:
        """The teacher's tokenizer, in the teacher's ids. To be read, not changed."""
        return self._source

    def _extend_map(self) -> None:
        """Give added tokens of the source their student ids, and check that the map is complete."""
        source, student = self._source.backend_tokenizer, self.backend_tokenizer
        self._token_map += [-1] * (source.get_vocab_size(with_added_tokens=True) - len(self._token_map))
        for source_id, token in source.get_added_tokens_decoder().items():
            student_id = student.token_to_id(token.content)
            self._token_map[source_id] = -1 if student_id is None else student_id
        size = student.get_vocab_size(with_added_tokens=True)
        wrong = next((i for i, target in enumerate(self._token_map) if not 0 <= target < size), None)
        if wrong is not None:
            raise ValueError(
                f"{TOKEN_MAP_FILE}: source id {wrong} has target {self._token_map[wrong]}, "
                f"but the student has ids 0 to {size - 1}"
            )

    def _map(self, input_ids: list[Any]) -> list[Any]:
        # Over Python lists a comprehension is two times faster than a trip through numpy.
        token_map = self._token_map
        if input_ids and isinstance(input_ids[0], list):
            return [[token_map[i] for i in row] for row in input_ids]
        return [token_map[i] for i in input_ids]

    def _encode_plus(  # type: ignore[override]
        self, text: Any, text_pair: Any = None, return_tensors: Any = None, **kwargs: Any
    ) -> BatchEncoding:
        for name in _SHARED_SETTINGS:
            setattr(self._source, name, getattr(self, name))
        is_batched = isinstance(text, (list, tuple))
        if kwargs.get("is_split_into_words"):
            is_batched = is_batched and bool(text) and isinstance(text[0], (list, tuple))
        if return_tensors is not None and not is_batched:
            # Tensors of a single text have a batch axis of one: encode a batch of one.
            text, text_pair = [text], [text_pair] if text_pair else None
        encoding = self._source._encode_plus(text, text_pair, return_tensors=None, **kwargs)
        encoding.data["input_ids"] = self._map(encoding.data["input_ids"])
        return BatchEncoding(encoding.data, encoding.encodings, tensor_type=return_tensors)

    def _convert_token_to_id_with_added_voc(self, token: str) -> int:
        student_id: int | None = self.backend_tokenizer.token_to_id(token)
        if student_id is not None:
            return student_id
        source_id: int | None = self._source.backend_tokenizer.token_to_id(token)
        return self.unk_token_id if source_id is None else self._token_map[source_id]

    def _encode_without_added_tokens(self, text: str) -> list[int]:
        return self._map(self._source._encode_without_added_tokens(text))

    def _add_tokens(self, new_tokens: list[Any], special_tokens: bool = False) -> int:
        added = super()._add_tokens(new_tokens, special_tokens)
        self._source._add_tokens(new_tokens, special_tokens)
        self._extend_map()
        return added

    def update_post_processor(self) -> None:
        super().update_post_processor()
        # The setters of these two would each rebuild the source's post-processor.
        object.__setattr__(self._source, "_add_bos_token", self.add_bos_token)
        object.__setattr__(self._source, "_add_eos_token", self.add_eos_token)
        self._source.update_post_processor()

    def _save_pretrained(
        self,
        save_directory: Any,
        file_names: tuple[str, ...],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        for backend in (self.backend_tokenizer, self._source.backend_tokenizer):
            # The last call's padding is no property of the tokenizer; each call sets its own.
            backend.no_padding()
            backend.no_truncation()
        files = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        source = self._source.backend_tokenizer.to_str(pretty=True).encode()
        token_map = {
            "version": TOKEN_MAP_VERSION,
            "size": len(self),
            "source_size": len(self._token_map),
            "source_sha256": hashlib.sha256(source).hexdigest(),
            "token_map": self._token_map,
        }
        with open(__file__, "rb") as this_file:
            contents = {
                SOURCE_TOKENIZER_FILE: source,
                TOKEN_MAP_FILE: (json.dumps(token_map) + "\n").encode(),
                "tokenization_glmd.py": this_file.read(),
            }
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        for name, content in contents.items():
            # A module with a prefix in its name could not be imported.
            path = os.path.join(save_directory, name if name.endswith(".py") else prefix + name)
            with open(path, "wb") as file:
                file.write(content)
            files += (path,)
        return files

    def train_new_from_iterator(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("a compressed vocabulary cannot be trained anew; train the source tokenizer instead")


def _read_source(source_tokenizer_file: str | None, token_map_file: str | None) -> tuple[Tokenizer, list[int]]:
    """The source backend and the map, refused unless they belong together."""
    if source_tokenizer_file is None or token_map_file is None:
        missing = SOURCE_TOKENIZER_FILE if source_tokenizer_file is None else TOKEN_MAP_FILE
        raise ValueError(f"{missing} is missing beside tokenizer.json; without it no text is encoded exactly")
    with open(source_tokenizer_file, "rb") as file:
        source = file.read()
    with open(token_map_file, encoding="utf-8") as file:
        saved = json.load(file)
    if not isinstance(saved, dict):
        raise ValueError(f"{token_map_file}: not a token map")
    if saved.get("version") != TOKEN_MAP_VERSION:
        raise ValueError(f"{token_map_file}: version {saved.get('version')}, this code reads {TOKEN_MAP_VERSION}")
    if hashlib.sha256(source).hexdigest() != saved["source_sha256"]:
        raise ValueError(f"{source_tokenizer_file} is not the file that {TOKEN_MAP_FILE} was made for (sha256 differs)")
    tokenizer = Tokenizer.from_str(source.decode())
    if not len(saved["token_map"]) == saved["source_size"] == tokenizer.get_vocab_size(with_added_tokens=True):
        raise ValueError(
            f"{token_map_file}: {len(saved['token_map'])} entries for {tokenizer.get_vocab_size(True)} source tokens"
        )
    return tokenizer, saved["token_map"]

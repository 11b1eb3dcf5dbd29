"""The tokenizers of compressed students. `import glmd.tokenizer` makes AutoTokenizer know them, as model cards say."""

from glmd.vocabulary.tokenizer import load_tokenizer

__all__ = ["load_tokenizer"]

"""GLM's tokenizer: that of BERT or GPT-2 with a start and an end of a piece, and GLM's frame around a text.

tokenizer = glm_tokenizer(AutoTokenizer.from_pretrained("bert-base-uncased"))
"""

from typing import Any

from tokenizers import AddedToken, Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from glmd.data.blank_infilling import END, START
from glmd.errors import ModelError
from glmd.vocabulary.tokenizer import require_fast

END_OF_TEXT = "<|endoftext|>"


def glm_tokenizer(source: Any) -> PreTrainedTokenizerFast:
    """A tokenizer with the ids of the published code, from BERT's or GPT-2's; one of a GLM is returned as it is.

    A text is `[CLS] text [PAD]`, of GPT-2's `[CLS] text <|endoftext|>`; a pair has nothing between its texts. So a
    text's end is the pad token, which a model tells from padding by the attention mask. Raises ModelError for others.
    """
    require_fast(source)
    known = source.get_vocab()
    if START in known and END in known and source.mask_token is not None:
        return source
    backend = Tokenizer.from_str(source.backend_tokenizer.to_str())
    names = {"cls_token": "[CLS]", "mask_token": "[MASK]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    further = [START, END]
    if all(name in known for name in ("[PAD]", *names.values())):
        end = "[PAD]"
        backend.add_special_tokens([START, END])
    elif END_OF_TEXT in known:
        end = END_OF_TEXT
        # These swallow a space before them, which else would be a token of its own.
        masks = [AddedToken(name, lstrip=True, special=True) for name in ("[MASK]", "[gMASK]", "[sMASK]")]
        backend.add_special_tokens([START, END, "[CLS]", masks[0], "[SEP]", "[UNK]", *masks[1:]])
        further += ["[gMASK]", "[sMASK]"]
    else:
        raise ModelError(
            f"{type(source).__name__}: neither BERT's special tokens nor {END_OF_TEXT} are in it; GLM's tokenizers are "
            "made of bert-base-uncased, bert-large-uncased or gpt2"
        )
    ids = [(name, backend.token_to_id(name)) for name in ("[CLS]", end)]
    backend.post_processor = processors.TemplateProcessing(f"[CLS] $A {end}", f"[CLS] $A $B {end}", ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{role: str(name) for role, name in names.items()},
        pad_token=end,
        extra_special_tokens=further,
        model_max_length=source.model_max_length,
    )

"""A published GLM, of the GLM repository or the hub, as a model folder with its tokenizer.

print(convert_glm("mp_rank_00_model_states.pt", "glm-110m", tokenizer="bert-base-uncased"))
"""

import os
import shutil
from pathlib import Path

from glmd import storage
from glmd.data.blank_infilling import glm_tokens
from glmd.errors import ModelError
from glmd.models.export import require_free_output
from glmd.models.glm.configuration import TOKEN_IDS
from glmd.models.glm.convert import converted_model
from glmd.models.glm.tokenizer import glm_tokenizer
from glmd.models.probes import prove_language_model
from glmd.models.source_tokenizer import load_source_tokenizer
from glmd.public import public
from glmd.vocabulary.tokenizer import save_tokenizer


@public
def convert_glm(
    checkpoint: str | Path,
    output: str | Path,
    *,
    tokenizer: str | Path,
    size: str | None = None,
    num_attention_heads: int | None = None,
) -> str:
    """Write a checkpoint's model and its tokenizer to `output`, and say in one line what it is.

    tokenizer: folder or hub id of the one that the model was trained with, bert-base-uncased, bert-large-uncased or
        gpt2, to which GLM's tokens are added; or a GLM's own. size, num_attention_heads: see `converted_model`.
    Raises GlmdError with one line.
    """
    output = Path(output)
    require_free_output(output)
    ready = glm_tokenizer(load_source_tokenizer(str(tokenizer), kind=None))
    ids = glm_tokens(ready)
    model = converted_model(checkpoint, size=size, num_attention_heads=num_attention_heads)
    config = model.config
    if len(ready) > config.vocab_size:
        raise ModelError(
            f"{tokenizer}: with GLM's tokens it has {len(ready)} tokens, and {checkpoint} has {config.vocab_size} "
            "rows of them; give the tokenizer that it was trained with"
        )
    published = next((each for each in TOKEN_IDS.values() if each["vocab_size"] == config.vocab_size), None)
    named = {"mask_token_id": ids.mask, "bos_token_id": ids.start, "eos_token_id": ids.end}
    other = [
        f"{name} {i} in place of {published[name]}" for name, i in named.items() if published and published[name] != i
    ]
    if other:
        raise ModelError(
            f"{tokenizer}: gives {', '.join(other)} with {config.vocab_size} rows, so {checkpoint} was trained with "
            "another tokenizer; give that"
        )
    config.mask_token_id, config.bos_token_id, config.eos_token_id = ids.mask, ids.start, ids.end
    config.pad_token_id = ready.pad_token_id
    prove_language_model(model)
    temporary = output.with_name(output.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    model.save_pretrained(temporary)
    save_tokenizer(ready, temporary)
    for path in sorted(temporary.iterdir()):
        storage.sync_to_disk(path)
    shutil.rmtree(output, ignore_errors=True)  # empty, or not there
    os.rename(temporary, output)
    storage.sync_to_disk(output.parent)
    parameters = sum(each.numel() for each in model.parameters())
    return (
        f"{output}: a GLM of {parameters:,} parameters, {config.num_hidden_layers} layers of {config.hidden_size}, "
        f"{len(ready):,} tokens; transformers opens it after `import glmd.glm`, or with trust_remote_code=True"
    )

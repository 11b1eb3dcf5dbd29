"""What a language model goes on to say, and how near that is to what it should have said.

texts = generate(model, tokenizer, [[1, 5, 9], ...], max_new_tokens=64)
exact_match(texts, references)       # 0.41
"""

from collections import defaultdict
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch

from glmd.errors import ConfigError

ROUGE = ("rouge1", "rouge2", "rougeL")
References = Sequence[Sequence[str]]  # of each text one or more, of which the nearest counts


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, batch_size: int = 16
) -> tuple[list[str], int]:
    """The text that follows each prompt, or that a decoder says to it, and how many of them had no end.

    prompts: ids of each. The likeliest token is taken each time, up to the model's end of text or `max_new_tokens`.
    Prompts of one length are run together, so that no padding has a say. Special tokens are left out of the texts.
    """
    of_length: dict[int, list[int]] = defaultdict(list)
    for number, prompt in enumerate(prompts):
        of_length[len(prompt)].append(number)
    texts, endless = [""] * len(prompts), 0
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    for length, numbers in of_length.items():
        skipped = 0 if model.config.is_encoder_decoder else length
        for first in range(0, len(numbers), batch_size):
            part = numbers[first : first + batch_size]
            ids = torch.tensor([prompts[i] for i in part], device=model.device)
            options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens}
            found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=pad, **options)
            for i, row in zip(part, found[:, skipped:].tolist(), strict=True):
                texts[i] = tokenizer.decode(row, skip_special_tokens=True)
                endless += not {*row} & _ends(model, tokenizer)
    return texts, endless


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end a text, by which `generate` stops."""
    told = getattr(model.generation_config, "eos_token_id", None)
    told = tokenizer.eos_token_id if told is None else told
    return set(told) if isinstance(told, list) else {told} - {None}


def exact_match(texts: Sequence[str], references: References) -> float:
    """Share of texts that are one of their references, but for white space at their ends."""
    pairs = zip(texts, references, strict=True)
    return sum(text.strip() in [each.strip() for each in given] for text, given in pairs) / len(texts)


def require_rouge() -> None:
    """Refuse to score by ROUGE without the package of its authors."""
    if find_spec("rouge_score") is None:
        raise ConfigError("--rouge needs rouge_score: pip install 'glmd[generation]', or leave it out")


def rouge(texts: Sequence[str], references: References) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L (Lin, 2004), F measures without stemming, the mean over texts of the best reference.

    Computed by rouge_score, as `evaluate` does.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE))
    found = [scorer.score_multi(list(given), text) for text, given in zip(texts, references, strict=True)]
    return {name: sum(each[name].fmeasure for each in found) / len(found) for name in ROUGE}

"""A GLM teaches a GLM of fewer tokens and layers by what both predict in a text and its blanks."""

import numpy as np
import torch
from glm_cases import tiny_glm

from glmd.data.batches import Collate, Examples
from glmd.data.blank_infilling import BlankInfilling, GlmTokens
from glmd.distillation.distiller import Distiller
from glmd.distillation.objective import Objective, Term
from glmd.distillation.teacher import OnlineTeacher
from glmd.vocabulary.vocabulary import Vocabulary

KEPT = np.array([0, 2, 3, 4, 5, 6, *range(10, 40, 2)])
TOKEN_MAP = np.where(np.isin(np.arange(40), KEPT), np.searchsorted(KEPT, np.arange(40)), 7)
TERMS = (
    Term("lm_logits", "kl_divergence", options={"temperature": 15.0}),
    Term("lm_labels", "hard_cross_entropy", tokens="masked"),
)


def blanks():
    rng = np.random.default_rng(0)
    rows = [[2, *rng.integers(10, 40, length), 3] for length in (12, 20, 5)]
    examples = Examples(np.array([14, 22, 7]), {"input_ids": np.concatenate(rows)}, {"example_id": np.arange(3)})
    infilling = BlankInfilling(GlmTokens(4, 5, 6, 4, 4), np.array([0, 2, 3, 4, 5, 6]), seed=0, ratio=0.3)
    return Collate(0)(infilling.corrupt(examples, np.array([[0, i, 0] for i in range(3)])))


def test_the_loss_of_a_text_with_blanks_is_that_of_both_models_logits():
    teacher, student, batch = tiny_glm(), tiny_glm(vocab_size=len(KEPT), num_hidden_layers=2), blanks()
    vocabulary = Vocabulary(KEPT, TOKEN_MAP)
    live = OnlineTeacher(teacher, None, vocabulary)
    distiller = Distiller(Objective(TERMS), TOKEN_MAP, language_model=student)
    sums = distiller(batch, live(batch))
    columns = ("attention_mask", "position_ids", "block_position_ids", "context_mask")
    given = {name: batch[name] for name in columns}
    own = student(input_ids=torch.from_numpy(TOKEN_MAP)[batch["input_ids"]], **given).logits
    theirs = teacher(input_ids=batch["input_ids"], **given).logits[..., KEPT]
    tokens = batch["attention_mask"].bool()
    log_own, log_theirs = ((each[tokens] / 15).log_softmax(-1) for each in (own, theirs))
    divergence = 225 * (log_theirs.exp() * (log_theirs - log_own)).sum()
    labeled = batch["lm_labels"] != -100
    labels = torch.from_numpy(TOKEN_MAP)[batch["lm_labels"][labeled]]
    entropy = -own[labeled].log_softmax(-1).gather(1, labels[:, None]).sum()
    torch.testing.assert_close(sums.double(), torch.stack([divergence, entropy]), rtol=1e-6, atol=1e-6)
    assert labeled.sum() == (tokens & (batch["context_mask"] == 0)).sum() > 0

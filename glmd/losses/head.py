"""What makes logits over a vocabulary from hidden states, as one value.

head = Head(weight, bias)
logits = head.logits(hidden)      # (..., H) -> (..., K)
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from glmd.losses.logits import NOT_SCALED, LogitScaling, merge_words


class Head(NamedTuple):
    """The final linear map of a language model, and what is done to its product. K tokens, H hidden size.

    With `merged_into` weight and bias have K + D rows: each of the last D tokens gives its probability to one of the
    first K (`merge_words`).
    """

    weight: Tensor  # (K, H) or (K + D, H)
    bias: Tensor | None = None  # (K,) or (K + D,)
    scaling: LogitScaling = NOT_SCALED
    merged_into: Tensor | None = None  # (D,)

    @property
    def size(self) -> int:
        """K, the number of tokens that it tells apart."""
        return len(self.weight) - (0 if self.merged_into is None else len(self.merged_into))

    def to(self, device: torch.device | str) -> "Head":
        """The same on another device."""
        weight, bias, scaling, merged_into = self
        moved = (None if each is None else each.to(device) for each in (bias, merged_into))
        return Head(weight.to(device), next(moved), scaling, next(moved))

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., K); with `merged_into` (N, H) -> (N, K), in float32 or better."""
        logits = self.scaling(linear(hidden, self.weight, self.bias))
        if self.merged_into is None:
            return logits
        return merge_words(logits.to(torch.promote_types(logits.dtype, torch.float32)), self.merged_into)

"""A learned choice among teachers for each example, as in RL-KD (arXiv:2012.06048).

policy = TeacherPolicy(width=768, teachers=2, classes=3, like=weight, seed=0)
odds = policy(states, losses, probabilities)                                     # (T, B)
chosen = chosen_by(odds, draws(seed, progress, example_ids, teachers=2))

The policy is trained by REINFORCE with the student, by one optimizer, and saved with the stage.
"""

import numpy as np
import torch
from torch import Tensor, nn


class TeacherPolicy(nn.Module):
    """The chance of each teacher to be asked about an example, all independent: a sigmoid of a linear map.

    width: of the first teacher's states. It sees its state of the first token, each teacher's cross-entropy with the
    label, and each teacher's probabilities of the classes. like: a weight, for device and dtype. seed: of the first
    weights, which all ranks draw alike.
    """

    def __init__(self, *, width: int, teachers: int, classes: int, like: Tensor, seed: int) -> None:
        super().__init__()
        inputs = width + teachers * (1 + classes)
        self.choice = nn.Linear(inputs, teachers, device="meta")
        bound, generator = inputs**-0.5, torch.Generator().manual_seed(seed)
        drawn = torch.empty(teachers, inputs).uniform_(-bound, bound, generator=generator)
        self.choice.weight = nn.Parameter(drawn.to(like.device, like.dtype))
        self.choice.bias = nn.Parameter(torch.zeros(teachers, device=like.device, dtype=like.dtype))

    def forward(self, states: Tensor, losses: Tensor, probabilities: Tensor) -> Tensor:
        """(T, B) log-odds, from (B, H) states, (T, B) losses and (T, B, C) probabilities, which are constants."""
        seen = torch.cat([states, losses.t(), probabilities.transpose(0, 1).flatten(1)], 1)
        odds: Tensor = self.choice(seen.detach().to(self.choice.weight.dtype))
        return odds.t()


def draws(seed: int, progress: float, example_ids: Tensor, teachers: int) -> Tensor:
    """(T, B) numbers in [0, 1): functions of seed, progress and example, whatever batch and rank it is in."""
    step = int(progress * 2**53)
    drawn = [np.random.default_rng([seed, step, number]).random(teachers) for number in example_ids.tolist()]
    return torch.from_numpy(np.array(drawn, dtype=np.float32).reshape(-1, teachers)).t()


def chosen_by(odds: Tensor, drawn: Tensor) -> Tensor:
    """(T, B) of 0 and 1: which teachers are asked, by log-odds and by draws."""
    return (drawn.to(odds.device) < odds.detach().float().sigmoid()).float()


def policy_loss(odds: Tensor, chosen: Tensor, reward: Tensor) -> Tensor:
    """(B,) whose gradient is that of REINFORCE: minus reward times the log-probability of what was chosen.

    odds, chosen: (T, B). reward: (B,), a constant; high is good.
    """
    log_probability = nn.functional.logsigmoid(torch.where(chosen > 0, odds, -odds)).sum(0)
    return -reward.detach() * log_probability

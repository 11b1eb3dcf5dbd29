"""What named parts of a backbone give in one call, for terms that compare parts of a user's own choice.

with ModuleOutputs(split.backbone, ["encoder.layer.3.attention"]) as outputs:
    split.run_backbone(inputs)
states = outputs.read("encoder.layer.3.attention")      # (R, S, H)
"""

from collections.abc import Collection
from contextlib import ExitStack
from typing import Any, Self

from torch import Tensor, nn

from glmd.errors import ConfigError, ModelError, suggestion
from glmd.models.heads import backbone


class ModuleOutputs:
    """Listens to modules of a backbone by their names."""

    def __init__(self, body: nn.Module, names: Collection[str]) -> None:
        self.body, self.names, self.hooks = body, [*dict.fromkeys(names)], ExitStack()
        self.found: dict[str, list[Any]] = {name: [] for name in names}

    def __enter__(self) -> Self:
        for name in self.names:
            keep = self.found[name].append
            handle = self.body.get_submodule(name).register_forward_hook(lambda _, __, output, keep=keep: keep(output))
            self.hooks.callback(handle.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self.hooks.close()

    def read(self, name: str) -> Tensor:
        """(R, S, ...) what a module gave; of several tensors the first. Raises ModelError where that is not one."""
        calls = self.found[name]
        if len(calls) != 1:
            raise ModelError(
                f"module {name} is called {len(calls)} times in a forward; one that is called once is needed"
            )
        output = calls[0][0] if isinstance(calls[0], tuple) else calls[0]
        if not isinstance(output, Tensor) or output.ndim < 3:
            given = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ModelError(f"module {name} gives {given}; a tensor (rows, tokens, ...) is needed")
        return output


def hear_last(body: nn.Module) -> None:
    """Let transformers take hidden states as the hooks of others leave them, which are there for the call that follows.

    It hangs up hooks of its own at the first call that asks for such, behind those that are there then, for good: hooks
    of a later call would come behind them, and the states would be other ones than in the first.
    """
    for module in body.modules():
        for key, hook in [*module._forward_hooks.items()]:
            if getattr(hook, "__module__", "").startswith("transformers."):
                module._forward_hooks[key] = module._forward_hooks.pop(key)


def require_modules(model: nn.Module, names: Collection[str], *, whose: str) -> None:
    """Refuse names that no part of a model's backbone has. Raises ConfigError, one line."""
    known = [name for name, _ in backbone(model).named_modules() if name]
    for name in names:
        if name not in known:
            close = suggestion(name, known) if len(known) < 20 else suggestion(name, known).partition("; known")[0]
            raise ConfigError(f"modules: {name} is no part of the {whose}'s backbone{close}")

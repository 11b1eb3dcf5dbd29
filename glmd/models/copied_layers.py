"""Proof that each layer that a student copied does what the teacher's did."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from glmd.errors import ModelError
from glmd.models.heads import backbone, lm_kind
from glmd.models.probes import as_it_was, logits_of, probe_inputs

OTHER_LAYERS = "choose layers that it treats alike (even and first begin with the teacher's first one), or scratch"


@torch.no_grad()
def prove_copied_layers(student: Any, teacher: Any, layers: Mapping[str, str]) -> None:
    """Prove that each copied layer, given what the teacher's was given, gives the teacher's output, bit for bit nearly.

    The student's own forward is run; what it hands to a layer beside hidden states (masks, positions) is its own, so a
    setting that a layer takes from its index, or that the forward does, shows. A decoder is given what the teacher's
    encoder gave.
    layers: names of the student's layers -> the teacher's.
    """
    if teacher.dtype != student.dtype:
        teacher = copy.deepcopy(teacher).to(student.dtype)
    inputs = probe_inputs(teacher)
    rows = student.config.get_text_config().vocab_size
    inputs |= {name: ids % rows for name, ids in inputs.items() if name.endswith("input_ids")}  # ids that both have
    ours, theirs = (
        [model.get_submodule(name) for name in names]
        for model, names in ((student, layers.keys()), (teacher, layers.values()))
    )
    with as_it_was(teacher), _recorded(theirs) as seen, _encoded(teacher) as read:
        logits_of(teacher, inputs)
    with as_it_was(student), _replayed(ours, seen) as got, _encoded(student, read):
        logits_of(student, inputs)
    for (name, origin), (given, expected), output in zip(layers.items(), seen, got, strict=True):
        update = (expected - given).abs().max() if given.shape == expected.shape else expected.abs().max()
        error = (output - expected).abs().max() if output.shape == expected.shape else torch.tensor(torch.inf)
        if not error <= 1e-5 * update:
            i, j = (each.rpartition(".")[2] for each in (name, origin))
            raise ModelError(
                f"student.initialization: layer {i} of the student is a copy of the teacher's layer {j} "
                f"and gives another output (relative difference {error / update:.1e}): "
                f"{type(student).__name__} treats layers by their number; {OTHER_LAYERS}"
            )


def _hidden_place(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str:
    """Where the hidden states are among what a layer is called with: the first of real numbers, (B, S, ..., H)."""
    places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for place, value in places:
        if isinstance(value, Tensor) and value.ndim >= 3 and value.is_floating_point():
            return place
    raise ModelError("student.initialization: a layer that is given no hidden states cannot be proved; give scratch")


def _main_output(output: Any) -> Tensor:
    found = next(iter(output.values())) if isinstance(output, Mapping) else output
    result: Tensor = found if isinstance(found, Tensor) else found[0]
    return result


@contextmanager
def _recorded(modules: Sequence[nn.Module]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """(input, output) of each module's last call."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    result: list[tuple[Tensor, Tensor]] = []

    def record(module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        place = _hidden_place(args, kwargs)
        given = (args[place] if isinstance(place, int) else kwargs[place]).clone()
        output = forward(*args, **kwargs)
        seen[module] = (given, _main_output(output).clone())
        return output

    with _wrapped(modules, record):
        yield result
    result += _of_each(seen, modules)


@contextmanager
def _replayed(modules: Sequence[nn.Module], seen: Sequence[tuple[Tensor, Tensor]]) -> Iterator[list[Tensor]]:
    """The modules' outputs, each on the recorded input in place of its own."""
    given = {module: each for module, (each, _) in zip(modules, seen, strict=True)}
    outputs: dict[nn.Module, Tensor] = {}
    result: list[Tensor] = []

    def replace(module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        place = _hidden_place(args, kwargs)
        if isinstance(place, int):
            args = (*args[:place], given[module], *args[place + 1 :])
        else:
            kwargs = kwargs | {place: given[module]}
        output = forward(*args, **kwargs)
        outputs[module] = _main_output(output).clone()
        return output

    with _wrapped(modules, replace):
        yield result
    result += _of_each(outputs, modules)


@contextmanager
def _encoded(model: Any, instead: Sequence[Tensor] = ()) -> Iterator[list[Tensor]]:
    """What an encoder-decoder's encoder gives, `instead` in its place where that is given; nothing of other models."""
    seen: list[Tensor] = []

    def record(_: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if instead:
            output.last_hidden_state = instead[0]
        seen.append(output.last_hidden_state.clone())
        return output

    is_pair = lm_kind(model.config) == "encoder-decoder"
    with _wrapped([backbone(model).get_submodule("encoder")] if is_pair else [], record):
        yield seen


def _of_each(found: Mapping[nn.Module, Any], modules: Sequence[nn.Module]) -> list[Any]:
    if not set(modules) <= found.keys():
        raise ModelError("student.initialization: a layer is never called, so no copy of it is proved; give scratch")
    return [found[module] for module in modules]


@contextmanager
def _wrapped(modules: Sequence[nn.Module], wrapper: Callable[..., Any]) -> Iterator[None]:
    """For a time each module's forward is `wrapper(module, its forward, args, kwargs)`.

    No hooks: SqueezeBERT calls the forward of its layers itself, which would pass them by.
    """
    own = {module: module.__dict__.get("forward") for module in modules}

    def wrap(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: wrapper(module, forward, args, kwargs)

    for module in modules:
        module.forward = wrap(module, module.forward)
    try:
        yield
    finally:
        for module, before in own.items():
            del module.forward
            if before is not None:
                module.forward = before

"""Methods as YAML, read strictly: configs/methods/*.yaml, or a file of the user's.

    method = load_method("glmd")        # {"pretraining": Objective, "task_lm": Objective, ...}

A YAML may only name options that the loss function has.
"""

import difflib
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from glmd.config import STAGES
from glmd.distillation.interventions import INTERVENTIONS, Intervention
from glmd.distillation.objective import Objective, Term
from glmd.distillation.own_losses import add_own_loss, is_own, try_loss
from glmd.distillation.schedules import Schedule
from glmd.distillation.signals import GIVEN, SIGNALS
from glmd.errors import RENAMED, ConfigError, suggestion
from glmd.losses.feature_loss import FeatureLoss
from glmd.losses.teacher_weights import WEIGHTINGS
from glmd.models.layers import LayerChoice, Layers
from glmd.strict_yaml import build, coerce, load_yaml, named_file

LARGEST_OPTION = 1024  # of what a loss counts: tokens of a window, heads; each makes its tensors so many times larger


def load_method(name: str) -> dict[str, Objective]:
    """Stage -> objective in the order in which they are run, from a built-in method or a YAML of the user's.

    `pretraining` is the one on the corpus; the others are over a task, `task_lm`, `task_soft_labels` or of a name of
    the method's own. Raises ConfigError naming file, stage, term and key.
    """
    path = named_file("methods", name)
    method: dict[str, Objective] = {}
    for stage, given in load_yaml(path).items():
        _check_stage(stage, list(method), str(path))
        where, intervention, terms = f"{path}: {stage}", None, given
        if isinstance(given, dict) and "terms" in given:
            for key in given.keys() - {"terms", "intervention"}:
                raise ConfigError(f"{where}.{key} is unknown{suggestion(key, ['terms', 'intervention'])}")
            terms = given["terms"]
            if "intervention" in given:
                intervention = parse_intervention(given["intervention"], f"{where}.intervention")
        if not isinstance(terms, list) or not terms:
            raise ConfigError(f"{where} must be a list of terms, or {{terms: [...], intervention: ...}}, got {given!r}")
        parsed = tuple(parse_term(term, f"{where}[{i}]", stage, path) for i, term in enumerate(terms))
        if any(term.in_turn for term in parsed) and not any(term.in_turn and term.of_layers for term in parsed):
            raise ConfigError(f"{where}: in_turn has no effect: no term on layers is in turn; remove it")
        _check_passes(parsed, intervention, where)
        names = [term.name.replace(".", "_") for term in parsed]
        if len(set(names)) < len(names):
            twice = next(term.name for term, name in zip(parsed, names, strict=True) if names.count(name) > 1)
            raise ConfigError(f"{where} has {twice} twice; add their weights, or give one of them a label of its own")
        method[stage] = Objective(parsed, intervention)
    if not method:
        raise ConfigError(f"{path}: no stage; name at least one of {', '.join(STAGES)}")
    return method


def _check_passes(terms: tuple[Term, ...], intervention: Intervention | None, where: str) -> None:
    """Refuse a second pass that is asked for by one of terms and intervention alone."""
    is_asked = any(term.intervened for term in terms)
    if is_asked and (intervention is None or intervention.kind.takes_gradient):
        why = "there is no intervention" if intervention is None else f"all terms are under {intervention.name}"
        raise ConfigError(f"{where}: intervened has no effect: {why}; remove it")
    layers = [term.name for term in terms if term.of_layers]
    if intervention is not None and intervention.kind.replaces_layers and layers and not is_asked:
        # The teacher's layers would report their states among the student's.
        raise ConfigError(
            f"{where}: {layers[0]} compares layers in whose place {intervention.name} runs the teacher's; remove one "
            "of the two"
        )
    if intervention is not None and intervention.kind.changes_teacher and not is_asked:
        raise ConfigError(
            f"{where}: intervention {intervention.name} has no effect on what the teacher says in the first pass; give "
            "a term intervened: true"
        )


def _check_stage(name: Any, before: list[str], path: str) -> None:
    """Refuse a name that no stage has, or that is most likely mistyped."""
    known, own = [each for each in STAGES if each not in before], r"task_[a-z0-9_]+"
    is_own = isinstance(name, str) and re.fullmatch(own, name) is not None and name != "task_teacher"
    is_mistyped = name not in STAGES and bool(difflib.get_close_matches(str(name), STAGES, n=1, cutoff=0.9))
    if name not in STAGES and (not is_own or is_mistyped or name in RENAMED):
        raise ConfigError(
            f"{path}: stage {name} is unknown{suggestion(str(name), known)}; a method's own begin with task_, "
            "in small letters"
        )
    if name == "pretraining" and before:
        raise ConfigError(f"{path}: pretraining stands behind {before[-1]}; stages run in their order: put it first")


def parse_term(values: Any, where: str, stage: str, beside: Path = Path("method.yaml")) -> Term:
    """A checked term from its YAML mapping. Raises ConfigError that begins with `where`.

    beside: the file that it stands in; one of a loss of the user's own lies in its folder.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be a mapping, got {values!r}")
    for key in ("signal", "loss"):
        if key not in values:
            raise ConfigError(f"{where}.{key} is missing")
        if not isinstance(values[key], str):
            raise ConfigError(f"{where}.{key} must be text, got {values[key]!r}")
    signal, loss = values["signal"], values["loss"]
    in_pretraining = [name for name, each in SIGNALS.items() if each.level != "example"]
    allowed = in_pretraining if stage == "pretraining" else list(SIGNALS)
    if signal not in allowed:
        raise ConfigError(f"{where}.signal {signal!r} is not possible here{suggestion(str(signal), allowed)}")
    kind = SIGNALS[signal]
    source: Mapping[str, str] = {}
    if is_own(loss):
        loss, source = add_own_loss(loss, signal, beside, where)
    if loss not in kind.losses:
        raise ConfigError(f"{where}.loss {loss!r} does not fit {signal}{suggestion(str(loss), kind.losses)}")
    function: Any = kind.losses[loss]
    options, of_layers = _options(function, where), _of_layers(function) if kind.level == "layer" else None
    own = _keys_of(signal, of_layers)
    for key in values:
        if key not in {"signal", "loss", *own, *options}:
            shown = f"{signal} {loss.partition('@')[0]}"
            raise ConfigError(f"{where}.{key} has no effect on {shown}{suggestion(key, [*own, *options])}")
    # Only a masked token has a label, so lm_labels speaks of masked tokens whatever is asked.
    tokens = ("all", "masked", "first", "mean") if of_layers and of_layers.unit == "token" else ("all", "masked")
    fields: dict[str, Any] = {"tokens": "masked"} if signal == "lm_labels" else {}
    if of_layers is not None and of_layers.needs_both:
        fields["projection"] = "both"
    for key in own & values.keys():
        choices = {"tokens": tokens, "teachers": weightings_of(signal)}.get(key, ())
        fields[key] = _checked(key, values[key], f"{where}.{key}", choices)
    given = {key: _checked_option(key, options[key], values[key], f"{where}.{key}") for key in options if key in values}
    for key, value in given.items():
        if type(value) is int and not 1 <= value <= LARGEST_OPTION and not source:
            raise ConfigError(f"{where}.{key} must be from 1 to {LARGEST_OPTION:,}, got {value:,}")
    if signal == "modules" and "modules" not in fields:
        raise ConfigError(f"{where}.modules is missing; give pairs of names [[student's, teacher's], ...]")
    # Whether heads divide a width is asked of the models.
    tried = {key: value for key, value in given.items() if source or key != "relation_heads"}
    if source or tried:
        try_loss(function, signal, tried, where, is_own=bool(source))
    if source and "temperature" in options:  # which the loss on chunks of the vocabulary gives it in any case
        given.setdefault("temperature", _default(function, "temperature"))
    _check_together(fields, of_layers, where)
    return Term(signal, loss, options=given, source=tuple(source.items()), **fields)


def _keys_of(signal: str, loss: FeatureLoss | None) -> set[str]:
    """What a term may say beside the options of its loss. loss: of layers."""
    kind = SIGNALS[signal]
    keys = {"weight", "label", "in_turn"} | ({"intervened"} if loss is None else set())
    is_of_texts = loss is not None and loss.unit == "text"
    keys |= {"tokens"} if kind.level != "example" and kind.labels is None and not is_of_texts else set()
    keys |= {"teachers"} if kind.labels is None else set()
    keys |= {"gkd_compat"} if signal == "lm_logits" else set()
    keys |= {"modules" if signal == "modules" else "layers"} if loss is not None else set()
    keys |= {"over_layers", "older_weight"} if loss is not None and not loss.takes_all_layers else set()
    keys |= {"projection", "projection_size"} if "hidden_states" in kind.needs else set()
    return keys - ({"in_turn"} if loss is not None and loss.takes_all_layers else set())


def weightings_of(signal: str) -> tuple[str, ...]:
    """What a term of a signal may take of several teachers: of layers constant weights, of tokens no labels' ones."""
    level = SIGNALS[signal].level
    return tuple(
        name
        for name, each in WEIGHTINGS.items()
        if each.constant
        or level == "example"
        or (level == "token" and each.function is not None and each.least_texts == 1 and not each.needs_labels)
    )


def _checked(key: str, value: Any, where: str, choices: tuple[str, ...]) -> Any:
    """The value of a term's own key. choices: of one that has some."""
    if key == "weight":
        return _checked_weight(value, where)
    if key == "modules":
        return _checked_modules(value, where)
    if key == "layers":
        return _checked_layers(value, where)
    kinds: dict[str, Any] = {
        "tokens": Literal[choices],
        "teachers": Literal[choices],
        "over_layers": Literal["mean", "sum"],
        "projection": Literal["none", "linear", "teacher", "both"],
        "projection_size": int,
        "gkd_compat": bool,
        "in_turn": bool,
        "intervened": bool,
        "older_weight": float,
        "label": str,
    }
    checked = coerce(kinds[key], value, where)
    if key == "label" and not re.fullmatch(r"\w*", checked):
        raise ConfigError(f"{where} must be letters, digits and _, got {value!r}")
    if key == "older_weight" and not 0 <= checked < float("inf"):
        raise ConfigError(f"{where} must be at least 0, got {value!r}")
    if key == "projection_size" and checked < 1:
        raise ConfigError(f"{where} must be at least 1, got {value!r}")
    return checked


def _check_together(fields: dict[str, Any], loss: FeatureLoss | None, where: str) -> None:
    """Refuse keys that have no effect beside others."""
    projection = fields.get("projection", "none")
    if "projection_size" in fields and projection != "both":
        raise ConfigError(f"{where}.projection_size has no effect without projection: both; remove it")
    if loss is not None and loss.needs_both and projection != "both":
        raise ConfigError(f"{where}.projection must be both, which this loss needs; got {projection!r}")
    if "older_weight" in fields and not fields.get("in_turn"):
        raise ConfigError(f"{where}.older_weight has no effect without in_turn: true; remove it")


def _of_layers(loss: Any) -> FeatureLoss:
    return loss if isinstance(loss, FeatureLoss) else FeatureLoss(loss)


def parse_intervention(values: Any, where: str) -> Intervention:
    """A checked intervention from its YAML mapping. Raises ConfigError that begins with `where`."""
    if not isinstance(values, dict) or not isinstance(values.get("name"), str):
        raise ConfigError(f"{where} must be a mapping with a name, got {values!r}")
    name = values["name"]
    if name not in INTERVENTIONS:
        raise ConfigError(f"{where}.name {name!r} is unknown{suggestion(str(name), INTERVENTIONS)}")
    options = _options(INTERVENTIONS[name], where)
    for key in values.keys() - {"name", *options}:
        raise ConfigError(f"{where}.{key} has no effect on {name}{suggestion(key, options)}")
    given = {key: coerce(options[key], values[key], f"{where}.{key}") for key in options if key in values}
    found = Intervention(name, given)
    try:
        found.kind.options(**given)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return found


def _checked_layers(given: Any, where: str) -> Layers:
    maps = ("uniform", "last", "first", "all", "every", "random", "middle", "embeddings")
    if given in maps:
        return str(given)
    if isinstance(given, dict):
        return build(LayerChoice, given, where)
    try:
        pairs = tuple(tuple(pair) for pair in coerce(list[list[int]], given, where))
    except ConfigError:
        pairs = ()
    if not pairs or any(len(pair) != 2 for pair in pairs) or len(set(pairs)) < len(pairs):
        wanted = f"{', '.join(maps)}, some of these {{map: uniform, start: -1}}, or pairs [[student, teacher], ...]"
        raise ConfigError(f"{where} must be {wanted}; got {given!r}")
    return pairs


def _options(function: Any, where: str) -> dict[str, Any]:
    """The keyword-only options of a loss or an intervention, with their types, without what the stage gives."""
    found = {}
    for parameter in _parameters(function).values():
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in GIVEN:
            kind = parameter.annotation
            if kind is parameter.empty and parameter.default is parameter.empty:
                raise ConfigError(f"{where}: option {parameter.name} has neither type nor default; give it one")
            found[parameter.name] = type(parameter.default) if kind is parameter.empty else kind
    return found


def _default(function: Any, option: str) -> Any:
    return _parameters(function)[option].default


def _parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    plain = getattr(function, "function", function)
    return inspect.signature(plain, eval_str=True).parameters


def _checked_modules(given: Any, where: str) -> tuple[tuple[str, str], ...]:
    try:
        pairs = coerce(list[list[str]], given, where)
    except ConfigError:
        pairs = []
    if not pairs or any(len(pair) != 2 for pair in pairs) or len(set(map(tuple, pairs))) < len(pairs):
        raise ConfigError(f"{where} must be different pairs of names [[student's, teacher's], ...]; got {given!r}")
    return tuple((ours, theirs) for ours, theirs in pairs)


def _checked_option(key: str, kind: Any, given: Any, where: str) -> Any:
    """The value of an option of a loss."""
    if key != "temperature":
        return coerce(kind, given, where)
    checked, values = _checked_schedule(given, where)
    for value in values:
        if not 0.01 <= value <= 10_000:  # beyond, float32 has nothing left of the logits' differences
            raise ConfigError(f"{where} must be from 0.01 to 10,000, got {value}")
    return checked


def _checked_weight(given: Any, where: str) -> Schedule:
    checked, values = _checked_schedule(given, where)
    for value in values:
        if not 0 <= value < float("inf"):
            raise ConfigError(f"{where} must be at least 0, got {value}")
    if not any(values):
        raise ConfigError(f"{where} is 0, so the term has no effect; remove the term")
    return checked


def _checked_schedule(given: Any, where: str) -> tuple[Schedule, list[float]]:
    """A number or a schedule, and the values that it takes."""
    checked: Any = coerce(float | dict[str, float] | list[list[float]], given, where)
    key = where.rpartition(".")[2]
    if isinstance(checked, dict):
        if set(checked) != {"from", "to"}:
            raise ConfigError(
                f"{where} must be a number, {{from: a, to: b}}, or [[progress, {key}], ...], got {given!r}"
            )
        return checked, [*checked.values()]
    if not isinstance(checked, list):
        return checked, [checked]
    if not checked or any(len(point) != 2 for point in checked):
        raise ConfigError(f"{where} must be points [[progress, {key}], ...], got {given!r}")
    places, values = ([point[i] for point in checked] for i in (0, 1))
    if list(places) != sorted(places) or not 0 <= places[0] <= places[-1] <= 1:
        raise ConfigError(f"{where}: progress must rise from 0 to 1 at most, got {list(places)}")
    return tuple((place, value) for place, value in checked), values

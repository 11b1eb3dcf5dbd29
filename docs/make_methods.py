"""Write docs/methods.md: every method of configs/methods, from its YAML, with what `benchmarks/methods.py` measured.

python docs/make_methods.py
"""

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

from glmd.distillation.methods import load_method
from glmd.distillation.objective import Objective, Term
from glmd.distillation.signals import GIVEN, SIGNALS, feature_loss
from glmd.distillation.theseus import require_alike
from glmd.models.layers import LayerChoice

PAGE = Path(__file__).with_name("methods.md")
MEASURED = Path(__file__).with_name("methods.json")
FOLDER = Path(__file__).parents[1] / "configs" / "methods"
INTRO = """\
# Methods

Made by `python docs/make_methods.py` from `configs/methods`: change these files alone.

A method is a YAML of terms for each of its stages, in the order in which they are run: `pretraining` on the corpus,
then those on each task. `method=tinybert` names one of these, `method=my-method.yaml` a file of yours. `task_lm` and
`task_soft_labels` have their settings under these keys, a stage of another name has those of `task_soft_labels` but
for what `stages` says: `stages.task_layers.num_train_epochs=3`.

All run on stock Hugging Face models, and leave stock ones: no projection is exported. A temperature's terms are
multiplied by its square, as in arXiv:1503.02531, where GLMD's published code leaves that out; weights below are such
that the balance of terms is that of its README. A mean is over tokens that are no padding, or texts, of a whole
batch.
"""
OWN = """\
## Terms

`{signal: ..., loss: ..., weight: 1}` and the options below; a key that has no effect is refused.

"""
WRITING = """\
`weight` is a number, `{from: 1, to: 0}` over the stage, or points `[[0, 1], [0.5, 0]]` that lines join, and so is a
`temperature`. `tokens: masked` asks of masked tokens alone; of layers `first` takes the first token of each text,
`mean` the mean of its tokens. [losses.md](losses.md) has the formulas of losses on logits.

**Layers** are counted from zero. `uniform`, `first` and `last` give each of the student's layers one of the
teacher's, as `student.initialization` does; `all` that of its number; `every` each of the teacher's; `random` drawn
ones in their order; `middle` is one pair, `embeddings` what goes into the first layer; or pairs `[[0, 1], [1, 3]]`.
Some of these: `{map: uniform, embeddings: true, start: 0, stop: -1}`, cut as Python cuts a list; `{map: random,
redraws: 10}` draws ten times in a stage. A term is the mean over its layers, or with `over_layers: sum` their sum.
`in_turn: true` divides the stage into one turn for each layer and a last one: layers join from the lowest, those
before weigh `older_weight`; in the last turn they do not count, and terms of other signals that are in turn do.

**Projections** of hidden states: `linear` learns one map from the student's width to the teacher's for all layers;
`teacher` one from each of the teacher's layers to the student's width; `both` one of each layer of both models, to
`projection_size`, at most 8 times the wider model's width; of layers that are drawn (`random`) one of each place in
their order, through which whichever is drawn there goes. Queries, keys, values, scores and probabilities of attention
are read from torch's `scaled_dot_product_attention` as a model calls it; a model that computes its attention by itself
can be asked for `attentions` alone, without attention dropout. A teacher's layers are not cached: beside a
`teacher.cache` the live teacher serves such stages, which `glmd check` says.

**Several teachers**, of `teacher.ensemble`, count as a term's `teachers` says; a method that says it is refused where
there is one.

| `teachers` | weight of each for a token or example | for |
| --- | --- | --- |
| `mean`, `sum`, `first` | alike, with sum 1 or 1 each; the first alone. Without the key their mean | all signals |
| `label_loss` | 1 / (1 + its cross-entropy with the label) (MT-BERT) | `task_logits` |
| `uncertainty` | of two, the last counts by the student's entropy over its largest (Dynamic KD, soft) | both logits |
| `uncertainty_rank` | one alone, the last where the student is least sure of a batch (hard) | `task_logits` |
| `dropout` | 1 for three examples in four, drawn (DGKD) | `task_logits` |
| `policy` | those that a policy draws, which is trained by REINFORCE (RL-KD) | `task_logits` |

Give the largest teacher first. With `assistants` a stage learns from the last of them; where any of its terms has
`teachers` other than `first`, all its terms see the teacher and all assistants, the teacher first. `policy` and
`dropout` of one teacher count 1.

**A loss of your own** is a function in a file beside the YAML. Keyword-only parameters are its options:

```python
# my_losses.py
def smooth_l1(student, teacher, *, beta: float = 1.0):
    difference = (student - teacher).abs()
    return (difference.clamp(max=beta) ** 2 / (2 * beta) + (difference - beta).clamp(min=0)).mean(-1)
```

```yaml
# my-method.yaml
pretraining:
  - {signal: hidden_states, loss: my_losses.py:smooth_l1, beta: 0.5, layers: {map: uniform, start: -1}}
  - signal: modules
    loss: mse
    modules: [[encoder.layer.1.attention, encoder.layer.3.attention]]
task_soft_labels:
  - {signal: task_logits, loss: kl_divergence}
```

It gives one value for each row of two tensors: (N, K) logits of a token or an example, (N, H) hidden states, (N,
heads, S) attention, (N, heads, D) queries, keys or values of a token. Its code runs with your rights, in `check` too.
A stage's record holds what the file is, and files beside it that it imports at its top; not what is installed. A loss
that needs whole texts is a `FeatureLoss(function, "row")` of `glmd.losses.feature_loss`. `modules` compares what
parts of both backbones give, by their names there. In Python, `HIDDEN_LOSSES["smooth_l1"] = smooth_l1` (of
`glmd.losses.features`) adds one for all methods.

**Interventions** change the student's forward: `{terms: [...], intervention: {name: ..., option: ...}}`; how they are
added is told in `glmd/distillation/interventions.py`. A term that says `intervened: true` is of a second pass, under
the intervention, and those that do not are of a first one without; terms of layers cannot say it.
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The whole page."""
    measured = json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.exists() else {}
    names = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    rows = [[f"[`{name}`](#{name})", _needs(load_method(name)), *_seconds(name, measured)] for name in names]
    header = ["method", "needs", "corpus step", "task step"]
    about = f"{measured['about']}\n" if measured else ""
    parts = [INTRO, _markdown(header, rows), about, OWN, _signals(), WRITING]
    for name in names:
        parts += [f"## {name}\n", _description(name), _stages(load_method(name))]
    return "\n".join(parts)


def _description(name: str) -> str:
    """The comment that a YAML begins with."""
    lines = []
    for line in (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return " ".join(lines) + "\n"


def _needs(method: dict[str, Objective]) -> str:
    """What a method asks for beside two models that share a tokenizer."""
    found: list[str] = []
    objectives = method.values()
    terms = [term for objective in objectives for term in objective.terms]
    if any(term.signal == "sentence_embeddings" for term in terms):
        found.append("a sentence encoder")
    if any(objective.reads("labels") for objective in objectives):
        found.append("labels")
    if any(objective.asks_assistants for objective in objectives):
        found.append("several teachers")
    elif any(objective.weighs_teachers for objective in objectives):
        found.append("assistants")
    if any(objective.reads_layers for objective in objectives):
        found.append("a live teacher")
    kinds = [objective.intervention.kind for objective in objectives if objective.intervention is not None]
    if any(_needs_width(term) for term in terms) or any(kind.check is require_alike for kind in kinds):
        found.append("one width")
    if any(_needs_heads(term) for term in terms):
        found.append("as many heads")
    if any(objective.couples for objective in objectives):
        found.append("undivided batches")
    return ", ".join(found) or "soft labels alone"


def _needs_width(term: Term) -> bool:
    of_vectors = term.signal in ("hidden_states", "sentence_embeddings")
    return of_vectors and feature_loss(term).same_width and term.projection == "none"


def _needs_heads(term: Term) -> bool:
    return term.signal in ("attentions", "attention_scores", "values") and "relation_heads" not in term.options


def _seconds(name: str, measured: dict[str, Any]) -> list[str]:
    found = measured.get("ratios", {}).get(name, {})
    return [f"{found[each]:.2f}" if each in found else "-" for each in ("corpus", "task")]


def _signals() -> str:
    rows = []
    for name, signal in SIGNALS.items():
        losses = []
        for loss, function in signal.losses.items():
            parameters = inspect.signature(getattr(function, "function", function)).parameters.values()
            options = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in GIVEN]
            losses.append(f"`{loss}`" + (f" ({', '.join(options)})" if options else ""))
        rows.append([f"`{name}`", f"{signal.level}s", ", ".join(losses)])
    return _markdown(["signal", "of", "losses (options)"], rows)


def _stages(method: dict[str, Objective]) -> str:
    rows = []
    for stage, objective in method.items():
        rows += [[f"`{stage}`", f"`{term.signal}`", f"`{term.loss}`", _said(term)] for term in objective.terms]
        if objective.intervention is not None:
            name, options = objective.intervention.name, _pairs(objective.intervention.options)
            told = (inspect.getdoc(objective.intervention.kind.function) or "").partition("\n")[0]
            rows.append([f"`{stage}`", "intervention", f"`{name}`", f"{options}. {told}"])
    return _markdown(["stage", "signal", "loss", "with"], rows)


def _said(term: Term) -> str:
    """What a term says beside signal and loss."""
    plain = {each.name: each.default for each in dataclasses.fields(Term)}
    left_out = ("signal", "loss", "options", "label", "source")
    given = {key: value for key, value in vars(term).items() if key not in left_out and value != plain[key]}
    if term.signal == "lm_labels":
        del given["tokens"]
    return _pairs(term.options | given)


def _pairs(options: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_shown(value)}" for key, value in options.items())


def _shown(value: Any) -> str:
    if isinstance(value, LayerChoice):
        plain = LayerChoice()
        given = {key: each for key, each in vars(value).items() if key == "map" or each != getattr(plain, key)}
        return " ".join(str(each) if key == "map" else f"{key} {each}" for key, each in given.items())
    if isinstance(value, tuple):
        return ", ".join(f"{at:g}: {weight:g}" for at, weight in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


if __name__ == "__main__":
    main()

"""What glmd assumes of a model, proved on a few ids when it is loaded.

    prove_language_model(model)        # split, padding, causality
    prove_task_model(classifier)       # the head on the backbone's outputs is the model's own, padding changes nothing
    prove_copied_layers(student, teacher, chosen)

A distilled logit is right only if all of this holds, and no name of a class says whether it does. Each function raises
ModelError, one line, and leaves the model as it was.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from glmd.errors import GlmdError, ModelError, disk_error
from glmd.models.heads import TASK_HEADS, Split, final_linear, is_bare, lm_kind
from glmd.models.quantization import is_quantized

LENGTH, PADDED = 12, 7  # tokens of a whole row of the probe, and of one with padding
# Largest difference, as a share of the largest output, that is still rounding: one value for each width of a number.
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@torch.no_grad()
def prove_language_model(model: Any) -> None:
    """Prove that a language model can be distilled from and into.

    Its logits are those of backbone, head and final linear map; padding changes none of them; where the config calls
    the model causal, a later id moves no earlier logit; and a forward changes nothing in the model.
    """
    head, name = final_linear(model), type(model).__name__
    with as_it_was(model):
        inputs = probe_inputs(model)
        own = logits_of(model, inputs)
        with refused(model, "its head does not run on its backbone's outputs alone"):
            parts = Split(model)
            split = head.logits(parts.hidden_before_final(parts.run_backbone(inputs)))
        valid = predicting(inputs)
        if own.shape != split.shape:
            raise ModelError(f"{name}: its logits are {tuple(own.shape)}, those of its split {tuple(split.shape)}")
        if differ(split[valid], own[valid]):
            _require_repeatable(model, inputs, own)
            raise ModelError(
                f"{name}: hidden states times the output embeddings differ from its logits (relative difference "
                f"{difference(split[valid], own[valid]):.1e}); its head is more than one linear map and is not "
                "supported"
            )
        _require_padding_unseen(model, inputs, own)
        if lm_kind(model.config) in ("causal", "encoder-decoder"):
            _require_causal(model, own)
        if "decoder_input_ids" in inputs:
            _require_shift(model, parts, inputs)


def prove_model(model: Any) -> None:
    """Prove what is assumed of a language model, of a task model, or of one without a head, by its class."""
    of_task = prove_encoder if is_bare(model) else prove_task_model
    (of_task if is_bare(model) or type(model).__name__.endswith(TASK_HEADS) else prove_language_model)(model)


@torch.no_grad()
def prove_encoder(model: Any) -> None:
    """Prove of a model without a head that padding changes none of its last states, and a forward nothing in it."""
    with as_it_was(model):
        inputs = probe_inputs(model)
        _require_padding_unseen(model, inputs, logits_of(model, inputs))


@torch.no_grad()
def prove_causal(model: Any) -> None:
    """Prove of a model that predicts next tokens, with whatever head, that a later id moves no earlier logit."""
    with as_it_was(model):
        _require_causal(model, logits_of(model, probe_inputs(model)))


@torch.no_grad()
def prove_texts_apart(model: Any) -> None:
    """Prove of a causal model that texts which share a row do not see each other, nor what pads the row."""
    with as_it_was(model):
        inputs = probe_inputs(model)
        ids, length = inputs["input_ids"], inputs["input_ids"].shape[1]
        first = max(1, length // 3)
        places = torch.arange(length, device=ids.device)
        # Two texts that fill a row, and two with the last id for padding.
        rows = torch.where(places < first, places, places - first).expand(2, -1).clone()
        rows[1, -1] = 0
        batch = {**{name: each[:2] for name, each in inputs.items()}, "text_positions": rows}
        with refused(model, "it does not read several conversations in a row", "give data.packing=false"):
            parts = Split(model)
            packed = parts.run_head(parts.run_backbone(parts.inputs(batch), is_full=False))
        texts = ({name: each[:1, span] for name, each in inputs.items()} for span in (slice(first), slice(first, None)))
        alone = torch.cat([logits_of(model, each) for each in texts], 1)[0]
        packed = packed.to(alone.dtype)  # of a quantized model as it is compared
        for row, stop in ((packed[0], length), (packed[1], length - 1)):
            if differ(row[:stop], alone[:stop]):
                raise ModelError(
                    f"{type(model).__name__}: conversations that share a row change each other (relative difference "
                    f"{difference(row[:stop], alone[:stop]):.1e}); give data.packing=false"
                )


@torch.no_grad()
def prove_task_model(model: Any) -> None:
    """Prove that a task head on its backbone's outputs gives the model's own logits, and that padding changes none.

    For classifiers (B, C) and multiple-choice models; a model that acts before its backbone, as Longformer's marks of
    global attention, would train by one forward and be scored by another.
    """
    shaped = _shape_of(model)
    with as_it_was(model):
        inputs = probe_inputs(model)
        own = logits_of(model, shaped(inputs))
        with refused(model, "its head does not run on its backbone's outputs alone"):
            parts = Split(model)
            split = parts.run_head(parts.run_backbone(inputs), inputs=shaped(inputs))
        if own.shape != split.shape or differ(split, own):
            _require_repeatable(model, shaped(inputs), own)
            raise ModelError(
                f"{type(model).__name__}: its task head on its backbone's outputs differs from its own logits "
                f"(relative difference {difference(split, own):.1e}); it does more, which is not supported"
            )
        _require_padding_unseen(model, inputs, own, shaped)


def _shape_of(model: Any) -> Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]:
    """How rows of ids are given to a model: of one with a multiple-choice head each is an example of one choice."""
    return one_choice_each if "MultipleChoice" in type(model).__name__ else dict


@torch.no_grad()
def silence_padding(model: Any) -> bool:
    """Set the vector of the pad token to zero, as torch begins it; whether it was another.

    MobileBERT gives each token its neighbors' vectors: with zeros for padding, a text's last token has the same
    neighbor whether padding follows or nothing does.
    """
    embeddings, pad = model.get_input_embeddings(), getattr(model.config.get_text_config(), "pad_token_id", None)
    if pad is None or not embeddings.weight[pad].any():
        return False
    embeddings.weight[pad] = 0
    return True


def prove_config(
    config: Any, auto_class: Any, prove: Callable[[Any], None], *, length: int | None = None, most: int = 100_000_000
) -> None:
    """Prove what can be known of a model by its config: on one with drawn weights, unless it has too many.

    length: how many tokens it must read at once.
    Drawn so that each part shows in the output: matrices by the width of what they read, other vectors near 1.
    """
    with torch.random.fork_rng(devices=[]):
        with torch.device("meta"):
            if sum(each.numel() for each in auto_class.from_config(config).parameters()) > most:
                return
        torch.manual_seed(0)
        model = auto_class.from_config(config).float()
        for parameter in model.parameters():
            drawn = torch.randn_like(parameter.data)
            parameter.data = drawn * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1 + 0.1 * drawn
        _require_reloadable(model)
        silence_padding(model)
        prove(model)
        if length is not None:
            require_length(model, length)
        _require_trainable(model)


def _require_reloadable(model: Any) -> None:
    """Prove that a model's folder gives back what was saved: Youtu's loses the vector of its pad token."""
    with refused(model, "it cannot be saved and opened again"), tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder, dtype=model.dtype).state_dict()
    changed = [key for key, value in model.state_dict().items() if not _same(value, again.get(key))]
    if changed:
        name = type(model).__name__
        raise ModelError(f"{name}: saved and opened again, it has another {changed[0]}; it is not supported")


@torch.no_grad()
def require_length(model: Any, length: int) -> None:
    """Prove that a model reads so many tokens, whatever its table of positions is called."""
    found = probe_inputs(model)
    inputs = {name: torch.cat([each[:1, :1].expand(1, length - 1), each[:1, -1:]], 1) for name, each in found.items()}
    with refused(model, f"it does not read {length} tokens at once", "give a smaller max_length"):
        model.eval()(**_shape_of(model)(inputs))


def _require_trainable(model: Any) -> None:
    """Prove that a step can be made: Reformer, trained, reads texts of one length alone."""
    model.train()
    with refused(model, "it cannot be trained"), torch.enable_grad():
        _given(model(**_shape_of(model)(probe_inputs(model)))).square().mean().backward()
    if model.get_input_embeddings().weight.grad is None:
        raise ModelError(f"{type(model).__name__}: no gradient reaches its embeddings; it is not supported")
    if not all(p.grad is None or p.grad.isfinite().all() for p in model.parameters()):
        raise ModelError(
            f"{type(model).__name__}: its gradients are not finite in training; is a dropout 1 in its config?"
        )
    model.zero_grad()


@contextmanager
def refused(model: Any, what: str, remedy: str = "it is not supported") -> Iterator[None]:
    """Whatever a model's own code raises, as one line; a full disk and our own refusals as they are."""
    try:
        yield
    except GlmdError:
        raise
    except Exception as error:
        if disk_error(error):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ModelError(f"{type(model).__name__}: {what} ({reason}); {remedy}") from None


def probe_inputs(model: Any) -> dict[str, Tensor]:
    """Three rows of ids: whole, whole with another last id, padded.

    An encoder-decoder's decoder reads such rows, its encoder reads the first of them twice. Each of the encoder's ends
    with the one end of the text, which a task head of theirs looks for.
    """
    config = model.config.get_text_config()
    device, size, pad = (
        model.get_input_embeddings().weight.device,
        config.vocab_size,
        getattr(config, "pad_token_id", None) or 0,
    )
    length = min(LENGTH, getattr(config, "max_position_embeddings", None) or LENGTH)
    length = length if length == LENGTH else max(2, length - pad - 1)  # positions may count from the padding's id
    ids = torch.linspace(0, size - 1, 3 * length, device=device).round().long()
    ids = torch.where(ids == pad, (ids + 1) % size, ids).reshape(3, length)
    mask = torch.ones_like(ids)
    mask[2, min(PADDED, length - 1) :] = 0
    ids[1, :-1], ids[2, mask[2] == 0] = ids[0, :-1], pad
    if lm_kind(model.config) != "encoder-decoder":
        return {"input_ids": ids, "attention_mask": mask}
    read, end = torch.cat([ids[:1], ids[:1], ids[2:]]), getattr(config, "eos_token_id", None)
    if isinstance(end, int):
        read = torch.where((read == end) & mask.bool(), (end + 1) % size, read)
        read.scatter_(1, mask.sum(1, keepdim=True) - 1, end)
    return {"input_ids": read, "attention_mask": mask, "decoder_input_ids": ids, "decoder_attention_mask": mask}


def _given(output: Any) -> Tensor:
    """Of a model's output the logits, or the last states where it has no head."""
    given: Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return given


def logits_of(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """The logits of a model, or the last states of one without a head. Raises ModelError where they are not finite."""
    with refused(model, "it does not read plain ids"):
        logits = _given(model(**inputs))
    read = logits[predicting(inputs)] if logits.ndim == 3 else logits
    if not read.isfinite().all():
        is_half = model.dtype in (torch.float16, torch.bfloat16)
        why = f"it overflows in {model.dtype}; give teacher.dtype=float32" if is_half else "its weights are damaged"
        found = "gives logits that are not finite (nan or inf) for plain ids"
        raise ModelError(f"{type(model).__name__}: {found}: {why}")
    # A last bit may send an activation to the next of 255 steps: compared as what is rounded to half precision.
    return logits.to(torch.bfloat16) if is_quantized(model) else logits


def predicting(inputs: Mapping[str, Tensor]) -> Tensor:
    """(R, S) where tokens are predicted: all but padding, of what a decoder reads where there is one."""
    return inputs.get("decoder_attention_mask", inputs["attention_mask"]).bool()


def _require_causal(model: Any, own: Tensor) -> None:
    """The first two rows differ in their last id alone."""
    if differ(own[1, :-1], own[0, :-1]):
        raise ModelError(
            f"{type(model).__name__}: its config names a causal LM, but the last token changes the logits of earlier "
            "ones; it reads text in both directions (is_decoder or is_causal in its config), which is not supported"
        )


@torch.no_grad()
def prove_answers_unseen(model: Any) -> None:
    """Prove that what an encoder-decoder's decoder begins with does not depend on what it is to say last.

    mBART's begins with the last token of what it is to say: a language's in its texts, and in a cloze the answer.
    """
    said = torch.full((2, 3), 5)
    said[1, -1] = 6
    with refused(model, "what its decoder reads of what it is to say cannot be told"):
        begun = Split(model).inputs({"input_ids": said})["decoder_input_ids"][:, 0]
    if begun[0] != begun[1]:
        raise ModelError(
            f"{type(model).__name__}: its decoder begins with the last token of what it is to say, which would be the "
            "answer to a cloze; give casting=head, or tasks={}"
        )


def _require_shift(model: Any, parts: Split, inputs: Mapping[str, Tensor]) -> None:
    """What a decoder is given to say something is what the model itself gives it for labels."""
    said, read = inputs["decoder_input_ids"][:1], {name: inputs[name][:1] for name in ("input_ids", "attention_mask")}
    what, remedy = "it makes nothing of labels for its decoder to read", "set what that names in its config"
    with refused(model, what, remedy):
        theirs = model(**read, labels=said).logits
        ours = model(**parts.inputs({**read, "target_ids": said})).logits
    if differ(ours, theirs):
        raise ModelError(
            f"{type(model).__name__}: its decoder reads something else for labels than what comes before them "
            f"(relative difference {difference(ours, theirs):.1e}); it is not supported"
        )


def _require_padding_unseen(
    model: Any, inputs: Mapping[str, Tensor], own: Tensor, shaped: Callable[..., Mapping[str, Tensor]] = dict
) -> None:
    """A row's outputs are the same without its padding."""
    count = int(inputs["attention_mask"][2].sum())
    alone = logits_of(model, shaped({key: each[2:, :count] for key, each in inputs.items()}))[0]
    padded = own[2, :count] if own.ndim == 3 else own[2]
    if differ(padded, alone):
        raise ModelError(
            f"{type(model).__name__}: padding changes its output (relative difference "
            f"{difference(padded, alone):.1e}); it does not keep to its attention mask and is not supported"
        )


def _require_repeatable(model: Any, inputs: Mapping[str, Tensor], own: Tensor) -> None:
    if differ(logits_of(model, inputs), own):
        raise ModelError(
            f"{type(model).__name__}: gives another output each time for the same ids; it is not supported"
        )


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference as a share of the largest value of `theirs`.

    In half precision that of the median position: rounding sends single tokens to other experts of a mixture.
    """
    if ours.shape != theirs.shape:
        return float("inf")
    is_half = theirs.dtype in (torch.bfloat16, torch.float16)
    ours, theirs = ours.float(), theirs.float()
    of_positions = (ours - theirs).abs().amax(-1) / theirs.abs().max().clamp(min=1e-12)
    return (of_positions.median() if is_half else of_positions.max()).item()


def differ(ours: Tensor, theirs: Tensor) -> bool:
    return not difference(ours, theirs) <= ROUNDING[theirs.dtype]


@contextmanager
def as_it_was(model: Any) -> Iterator[None]:
    """In evaluation mode, and then in the mode it was in. Raises ModelError where a forward changed the model."""
    modes = {module: module.training for module in model.modules()}
    before = _state(model)
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
    changed = [key for key, value in _state(model).items() if not _same(value, before.get(key))]
    if changed:
        was = before.get(min(changed))
        shown = "" if isinstance(was, Tensor) else f" ({was!r} before)"
        raise ModelError(
            f"{type(model).__name__}: a forward changes {min(changed)} in the model{shown}, so that what it gives "
            "depends on what it was given before; where its config can fix that, do so there"
        )


def _state(model: Any) -> dict[str, Any]:
    """What a forward could change and a later one read: buffers, plain attributes of modules, modules, the config."""
    state: dict[str, Any] = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for name, module in model.named_modules():
        state[f"{name} (its class)"] = type(module).__name__
        for key, value in vars(module).items():
            if isinstance(value, (bool, int, float, str, type(None))) and key != "training":
                state[f"{name}.{key}".lstrip(".")] = value
    for key, value in model.config.to_dict().items():
        state[f"config.{key}"] = repr(value)
    return state


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    return type(a) is type(b) and (a == b or a != a)


def one_choice_each(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """(R, S) rows as R examples of one choice for a stock multiple-choice model: no row is spent on padding."""
    return {name: each.unsqueeze(1) for name, each in inputs.items()}


@torch.no_grad()
def prove_attentions(model: Any, *, training: bool) -> None:
    """Prove that a model's layers give attention probabilities (B, A, S, S), of which each token's sum to 1.

    training: as it is while it learns; transformers gives them after their dropout.
    """
    split, name, modes = Split(model), type(model).__name__, {module: module.training for module in model.modules()}
    inputs = probe_inputs(model)
    try:
        model.train(training)
        with torch.random.fork_rng(), refused(model, "it does not give its attentions"):
            found = split.run_backbone(inputs, output_attentions=True).attentions
    finally:
        for module, mode in modes.items():
            module.training = mode
    batch, length = inputs["input_ids"].shape
    if not found or any(each is None or each.ndim != 4 or each.shape[::2] != (batch, length) for each in found):
        raise ModelError(f"{name}: it does not give the attentions of each layer, so none can be compared")
    valid = inputs["attention_mask"].bool()
    sums = torch.stack([each.transpose(1, 2)[valid].sum(-1).float() for each in found])
    if not (sums - 1).abs().max() < 2e-2:
        why = (
            "are given after attention dropout; give student.config.attention_probs_dropout_prob=0, or its like"
            if training
            else "do not sum to 1"
        )
        raise ModelError(f"{name}: its attentions cannot be compared: they {why}")

"""A plan for a person to read, as `glmd check` prints it: models, stages, steps."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from glmd.config import FLOAT16_HEADS, RunConfig
from glmd.models.layers import depths
from glmd.planning.plan import Plan
from glmd.planning.stages import Stage, lines
from glmd.runtime.determinism import NO_TF32, has_tensor_float32


@contextmanager
def synthetic_data(config: RunConfig) -> Iterator[Path | None]:
    """The folder of the synthetic data, for as long as it is read, where the config asks for it."""
    if not config.data.synthetic:
        yield None
        return
    from glmd.data.synthetic import build_synthetic

    with tempfile.TemporaryDirectory() as temporary:
        synthetic = Path(temporary) / "synthetic"
        build_synthetic(synthetic)
        yield synthetic


def describe(plan: Plan, world_size: int) -> str:
    """The plan for a person: models and how they split, stages with steps, examples and tokens at most."""
    config = plan.config
    text = [
        f"teacher   {config.teacher.model or 'trained here from scratch'}",
        f"method    {config.method}",
        f"weights   {_precision(plan)}",
        "",
        f"{'parameters':<20}{'total':>14}{'vocabulary':>14}{'body':>14}{'layers':>8}{'tokens':>9}{'embedding':>11}",
    ]
    sides = [("teacher", plan.teacher_config, plan.source_size)]
    sides += [(f"teacher {i}", model, plan.source_size) for i, model in enumerate(plan.ensemble_configs, start=2)]
    for i, (assistant, model) in enumerate(zip(config.assistants, plan.assistant_configs, strict=True), start=1):
        words = plan.kept_size if assistant.vocabulary == "student" else plan.source_size
        sides.append((f"assistant {i}", model, words))
    sides.append(("student", plan.student_config, plan.kept_size))
    for name, model, words in sides:
        p = plan.parameters[name]
        counts = f"{p['total']:>14,}{p['vocabulary']:>14,}{p['body']:>14,}"
        layers = "+".join(map(str, depths(model)))
        text.append(f"{name:<20}{counts}{layers:>8}{words:>9,}{p['embedding_size']:>11,}")
    width = max(20, *(len(stage.name) + 1 for stage, *_ in lines(plan, world_size)))
    swept = [f"{each}.{key} {values}" for each, keys in config.sweep.items() for key, values in keys.items()]
    text += ["", f"{'stage':<{width}}{'steps':>9}{'batch':>7}{'length':>8}{'examples':>10}{'tokens at most':>17}"]
    text += [_stage_line(stage, world_size, width) for stage, *_ in lines(plan, world_size)]
    controls = [name for name, on in vars(config.controls).items() if on] if config.tasks else []
    text += ["", *_corpus_line(plan)]
    text += [f"seeds     {', '.join(map(str, config.seeds))}", f"controls  {', '.join(controls) or 'none'}"]
    text += [f"sweep     {len(config.grid_points)} grid points: {', '.join(swept)}"] if swept else []
    text += [f"attention {config.attn_implementation}"] if config.attn_implementation else []
    return "\n".join([*text, f"output    {config.output_dir}"])


def _corpus_line(plan: Plan) -> list[str]:
    """Of a corpus of conversations, what becomes of them."""
    if plan.conversations is None:
        return []
    at = "the assistant's tokens" if plan.conversations.loss_on == "assistant" else "all tokens"
    shared = "packed" if plan.packs else "a block each"
    return [f"corpus    conversations in {plan.conversations.field}, loss on {at}, {shared}"]


def _precision(plan: Plan) -> str:
    """In which precision weights are trained, the teacher runs, and what is otherwise than one may expect."""
    config, held = plan.config, getattr(plan.teacher_config, "dtype", None)
    kept = str(held).removeprefix("torch.") if held is not None else "float32"
    whose = f", though the teacher's file holds {kept}" if kept != "float32" and config.teacher.scratch is None else ""
    said = f"trained in float32{whose}; the teacher runs in {config.teacher.dtype}"
    said += f", its layers in {config.teacher.quantization}" if config.teacher.quantization else ""
    said = f"{said}; {FLOAT16_HEADS}" if config.mixed_precision == "fp16" else said
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    return f"{said}; {NO_TF32}" if config.tf32 and not has_tensor_float32(device) else said


def _stage_line(stage: Stage, world_size: int, width: int) -> str:
    settings, examples = stage.training, len(stage.examples)
    steps, batch = settings.steps(examples, world_size), settings.global_batch_size(world_size)
    shown = f"{examples:,}" if stage.task is not None else "corpus"
    figures = f"{steps:>9,}{batch:>7}{stage.length:>8}{shown:>10}{steps * batch * stage.length:>17,}"
    return f"{stage.name:<{width}}{figures}" + (f"  {stage.swept}" if stage.swept else "")

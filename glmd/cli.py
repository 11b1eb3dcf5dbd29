"""The command line: `glmd run`, `compare`, `check`, `plan`, `cache`, `init-task`, `compress`, `convert-glm`,
`evaluate`, `predict`, `vocab`, `verify`, `export` and `report`.

Each command imports what it needs when it runs, so that help and config errors are instant. A refusal is one line on
stderr and exit code 2; `glmd.commands.terminal` has how commands end otherwise.
"""

import argparse
import atexit
import dataclasses
import gc
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from glmd.commands.arguments import build_parser
from glmd.commands.own_data import Flags, run_of_flags, student_of_flags
from glmd.commands.terminal import ended, prepare_streams, say
from glmd.config import RunConfig
from glmd.config_file import differences, load_config, read_values, to_dict, words_of_file
from glmd.errors import ConfigError, GlmdError
from glmd.runtime import phases


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    # As Python ends it would look for garbage among all that was imported, for a second.
    atexit.register(gc.freeze)
    prepare_streams()
    _set_up_logging()

    def command() -> None:
        options = _parse(arguments)
        options.command(options)

    return ended(command)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command and what it is given; a config's overrides may stand behind options too."""
    parser = build_parser(COMMANDS)
    options, further = parser.parse_known_args(arguments)
    if "overrides" not in options or any("=" not in each or each.startswith("-") for each in further):
        return parser.parse_args(arguments)  # which refuses what it does not know
    options.overrides += further
    return options


def _words(options: argparse.Namespace) -> tuple[str | None, list[str]]:
    """The config and its overrides. `glmd run a=b` has no config: its first word is an override."""
    words = [options.config, *options.overrides] if options.config else list(options.overrides)
    path = words.pop(0) if words and "=" not in words[0] else None
    return path, words


def _is_comparison(options: argparse.Namespace) -> bool:
    """Whether the YAML, with its overrides, is of a comparison."""
    return not _flags(options).given and "compare" in read_values(*_words(options))[1]


def _config(options: argparse.Namespace) -> RunConfig:
    path, words = _words(options)
    flags = _flags(options)
    if not flags.given:
        return load_config(path, words)
    if path is not None:
        raise ConfigError(f"{path} and {flags.given[0]} are both given; keep the YAML or the flags")
    values, said = run_of_flags(flags)
    config = load_config(values, words)
    keys = {"--output": "output_dir", "--layers": "student.num_hidden_layers", "--keep-ratio": "vocabulary.keep_ratio"}
    for option, key in keys.items():
        if option in flags.given and any(word.partition("=")[0] == key for word in words):
            raise ConfigError(f"{option} and {key}= are both given; keep one")
    for line in [*said, student_of_flags(config)]:
        logging.getLogger("glmd").info("%s", line)
    return config


def _flags(options: argparse.Namespace) -> Flags:
    """Those of a run of flags; `cache` and `compare` have none."""
    names = [each.name for each in dataclasses.fields(Flags)] if "data" in options else []
    given = {name: getattr(options, name) for name in names}
    return Flags(**{name: value for name, value in given.items() if value is not None})


def _run(options: argparse.Namespace) -> None:
    config = _config(options)
    with phases.imports():
        from glmd.commands.usage import describe_students
        from glmd.pipeline.run import run
        from glmd.reporting.report import results_table

    try:
        results = run(config)
    finally:
        gc.unfreeze()  # what was imported, also where the run was refused before it began
    if int(os.environ.get("RANK", "0")) == 0:
        say(results_table(results), end="")
        say(f"\n{describe_students(config, results)}\n`glmd report {config.output_dir}` prints the table again.")


def _compare(options: argparse.Namespace) -> None:
    path, words = _words(options)
    with phases.imports():
        from glmd.commands.compare import describe_table
        from glmd.pipeline.compare import run_comparison
        from glmd.planning.comparison import load_comparison

    comparison = load_comparison(path, words)
    try:
        table = run_comparison(comparison)
    finally:
        gc.unfreeze()
    if int(os.environ.get("RANK", "0")) == 0:
        say(describe_table(comparison, table))


def _check(options: argparse.Namespace) -> None:
    if _is_comparison(options):
        from glmd.commands.compare import check_comparison

        say(check_comparison(*_words(options)))
        return
    config = _config(options)
    from glmd.commands.check import describe, synthetic_data
    from glmd.data.token_store import require_same_store
    from glmd.pipeline.elastic import processes_of
    from glmd.pipeline.run_folder import require_free_folder, with_dtype_of
    from glmd.planning.limits import require_sizes_and_room
    from glmd.planning.plan import corpus_sources, is_config_alone, make_plan, make_sketch
    from glmd.training.fsdp import require_sound_launch

    require_sound_launch(os.environ, config.mixed_precision)
    config = with_dtype_of(config)
    require_free_folder(config)
    if is_config_alone(config.teacher.model):
        plan = make_sketch(config)
        of_it = (
            f"{config.teacher.model} holds a config alone: its weights and tokenizer, and the texts, are not looked at"
        )
        say(f"{describe(plan, int(os.environ.get('WORLD_SIZE', '1')))}\n\n{of_it}")
        return
    cache = []
    with synthetic_data(config) as synthetic:
        plan = make_plan(config, synthetic=synthetic)
        launched = os.environ.get("WORLD_SIZE")
        processes, of_the_run = processes_of(plan, None if launched is None else int(launched))
        if plan.corpus is not None and synthetic is None:
            store = Path(config.output_dir) / "corpus"
            field, reader = config.data.text_field, plan.conversations
            require_same_store(store, plan.corpus, plan.tokenizer, text_field=field, conversations=reader)
        require_sizes_and_room(plan, synthetic, int(launched or 1))
        if config.teacher.cache is not None:
            from glmd.planning.caches import describe_cache

            cache = [describe_cache(plan, corpus_sources(config, synthetic))]
    say("\n".join([describe(plan, processes), *cache, *of_the_run]))


def _plan(options: argparse.Namespace) -> None:
    if not _is_comparison(options):
        _plan_run(options, _config(options))
        return
    from glmd.planning.comparison import load_comparison

    for arm in load_comparison(*_words(options)).arms:
        say(f"{arm.name}" if not options.json else json.dumps({"arm": arm.name}))
        try:
            _plan_run(options, arm.config)
        except GlmdError as error:
            if arm.is_reference:
                raise
            say(f"refused: {error}")


def _plan_run(options: argparse.Namespace, config: RunConfig) -> None:
    from glmd.commands.check import synthetic_data
    from glmd.pipeline.run_folder import with_dtype_of
    from glmd.planning import run_cost as costs
    from glmd.planning.limits import require_sizes
    from glmd.planning.plan import corpus_sources, is_config_alone, make_plan, make_sketch
    from glmd.planning.rules import with_dtype

    # A GPU that is not here is taken to be one of today.
    config = with_dtype_of(config) if options.device_memory is None else with_dtype(config, "bfloat16")
    layout = costs.Layout(options.devices, options.device_memory, options.sharding)
    if is_config_alone(config.teacher.model):
        plan = make_sketch(config)
    else:
        with synthetic_data(config) as synthetic:
            plan = make_plan(config, synthetic=synthetic)
            require_sizes(plan, corpus_sources(config, synthetic), processes=options.devices)
    cost = costs.run_cost(plan, layout, measure=options.measure)
    say(costs.to_json(cost) if options.json else costs.table(cost))


def _cache(options: argparse.Namespace) -> None:
    config = _config(options)
    from glmd.pipeline.run import make_cache

    make_cache(config)
    if int(os.environ.get("RANK", "0")) == 0:
        say(f"{config.teacher.cache}: complete; runs with this teacher.cache read it.")


def _init_task(options: argparse.Namespace) -> None:
    from glmd.commands.init_task import init_task

    labels = options.label or [None]
    if len(labels) > 1:
        raise ConfigError(
            f"--label names {len(labels)} columns; a YAML has one. Columns of 0 and 1 are given to a run: tasks: "
            f"{{NAME: {{train: {options.file}, text: COLUMN, label: [{', '.join(labels)}]}}}}"
        )
    columns = {"text": options.text, "text_pair": options.text_pair, "label": labels[0]}
    say(init_task(options.file, **columns, problem_type=options.problem_type))


def _compress(options: argparse.Namespace) -> None:
    from glmd.commands.compress import compress_model

    listed = words_of_file(options.keep_words_file, "--keep-words-file") if options.keep_words_file else []
    text = compress_model(
        options.model,
        options.output,
        corpus=options.corpus,
        keep_ratio=options.keep_ratio,
        size=options.size,
        multiple_of=options.multiple_of,
        selection=options.selection,
        mapping=options.mapping,
        within_class=options.within_class,
        similarity=options.similarity,
        keep_words=[*options.keep_words, *listed],
        corpus_weights=options.corpus_weights,
        text_field=options.text_field,
        messages_field=options.messages_field,
    )
    say(text)


def _convert_glm(options: argparse.Namespace) -> None:
    from glmd.commands.convert_glm import convert_glm

    say(
        convert_glm(
            options.checkpoint,
            options.output,
            tokenizer=options.tokenizer,
            size=options.size,
            num_attention_heads=options.num_attention_heads,
        )
    )


def _evaluate(options: argparse.Namespace) -> None:
    kind = "references" if options.references is not None else "text" if options.text is not None else "data"
    used = {
        "references": ("references", "messages_field", "max_new_tokens", "rouge", "output", "batch_size"),
        "text": ("text", "messages_field", "max_length"),
        "data": ("data", "task", "split", "tokenizer", "batch_size", "max_length"),
    }
    all_names = dict.fromkeys(name for names in used.values() for name in names)
    idle = [name for name in all_names if name not in used[kind] and getattr(options, name) is not None]
    if idle and (kind != "data" or options.data is not None or options.task is not None):
        raise ConfigError(f"--{idle[0].replace('_', '-')} has no effect beside --{kind}; remove one of them")
    scores: Mapping[str, float | str]
    if kind == "references":
        from glmd.commands.generations import MAX_NEW_TOKENS, evaluate_references

        scores = evaluate_references(
            options.model,
            options.references,
            messages_field=options.messages_field,
            max_new_tokens=options.max_new_tokens or MAX_NEW_TOKENS,
            batch_size=options.batch_size or 16,
            with_rouge=bool(options.rouge),
            output=options.output,
        )
    elif kind == "text":
        from glmd.commands.evaluate import evaluate_text

        field = options.messages_field
        scores = evaluate_text(options.model, options.text, max_length=options.max_length, messages_field=field)
    else:
        if idle:
            where = "--text or --references" if idle[0] == "messages_field" else "--references"
            raise ConfigError(f"--{idle[0].replace('_', '-')} has no effect without {where}; give files, or remove it")
        if options.data is None:
            raise ConfigError("--data is missing; give --task and --data, or --text or --references for a causal LM")
        from glmd.commands.evaluate import evaluate_folder

        scores = evaluate_folder(
            options.model,
            options.task,
            options.data,
            options.split or "val",
            max_length=options.max_length,
            batch_size=options.batch_size or 64,
            stock=options.tokenizer == "stock",
        )
    for name, value in scores.items():
        say(f"{name:<22}{value:>10.4f}" if isinstance(value, float) else f"{name:<22}{value:>10}")


def _predict(options: argparse.Namespace) -> None:
    from glmd.commands.evaluate import predict_file, predicted_file

    output = options.output or predicted_file(options.file)
    count = predict_file(
        options.model,
        options.task,
        options.file,
        output,
        text=options.text,
        text_pair=options.text_pair,
        max_length=options.max_length,
        batch_size=options.batch_size,
    )
    say(f"{output}: answers to {count} examples")


def _export(options: argparse.Namespace) -> None:
    from glmd.commands.export import export_folder

    say(export_folder(options.source, options.output, kind=options.kind))


def _vocab(options: argparse.Namespace) -> None:
    from glmd.commands import vocab as budget

    if options.picture is not None:
        budget.require_plots()
    for path in (options.json, options.picture):
        budget.require_free_file(path)
    curve = budget.budget_curve(
        options.teacher,
        options.corpus,
        ratios=options.keep_ratios or budget.RATIOS,
        selection=options.selection,
        text_field=options.text_field,
    )
    say(budget.curve_table(curve))
    if options.json is not None:
        options.json.write_text(budget.curve_json(curve), encoding="utf-8")
    if options.picture is not None:
        budget.draw_curve(curve, options.picture)
    if options.examples is not None:
        ratio = curve.knee.keep_ratio
        rows = budget.examples(
            options.teacher,
            curve.counts,
            ratio,
            mapping=options.mapping,
            selection=options.selection,
            top=options.examples,
        )
        say(f"\nAt {ratio:g}, mapped by {options.mapping}, the most frequent of the dropped tokens:\n")
        say(budget.examples_table(rows))


def _verify(options: argparse.Namespace) -> None:
    from glmd.commands.verify import verify_folder

    checks = verify_folder(options.folder)
    for check in checks:
        say(check.line())
    if any(check.problem for check in checks):
        raise SystemExit(1)


def _report(options: argparse.Namespace) -> None:
    from glmd.reporting.report import load_results, results_table

    folder, *others = options.runs
    if others or (folder / "comparison.yaml").is_file():
        from glmd.commands.compare import report_comparison

        say(report_comparison(options.runs, options.reference, options.format or "markdown", options.picture), end="")
        return
    for name in ("reference", "format", "picture"):
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name} has no effect on one run; give several, or a comparison")
    results = load_results(folder)
    say(results_table(results), end="")
    if results.get("exports_verified") is False:
        print("glmd: the exports are not verified yet; `glmd run` with the run's config does it", file=sys.stderr)
    recorded = folder / "config.yaml"
    if "of" in results and recorded.is_file():
        now = to_dict(load_config(recorded))
        grown = differences(results["of"], {key: now[key] for key in results["of"]})
        if grown:
            print(
                f"glmd: the run has grown since ({'; '.join(grown)}); `glmd run` completes the table", file=sys.stderr
            )


COMMANDS = {
    "run": _run,
    "compare": _compare,
    "check": _check,
    "plan": _plan,
    "cache": _cache,
    "init-task": _init_task,
    "compress": _compress,
    "convert-glm": _convert_glm,
    "evaluate": _evaluate,
    "predict": _predict,
    "vocab": _vocab,
    "verify": _verify,
    "export": _export,
    "report": _report,
}


def _set_up_logging() -> None:
    """glmd's own messages on stderr, on the main process; other libraries only when something is wrong."""
    is_main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(message)s", level=logging.WARNING if is_main else logging.ERROR, stream=sys.stderr)
    logging.getLogger("glmd").setLevel(logging.INFO if is_main else logging.ERROR)
    for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    if "transformers" in sys.modules:  # which has looked at them already
        transformers_logging = sys.modules["transformers"].utils.logging
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()

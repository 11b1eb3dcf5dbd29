"""The command line: `glmd run`, `compare`, `check`, `plan`, `cache`, `compress`, `evaluate`, `predict`, `vocab`,
`verify`, `export` and `report`.

Each command imports what it needs when it runs, so that help and config errors are instant. A refusal is one line on
stderr and exit code 2; `glmd.commands.terminal` has how commands end otherwise.
"""

import argparse
import atexit
import gc
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from glmd.commands.terminal import ended, prepare_streams, say
from glmd.config import RunConfig
from glmd.config_file import differences, load_config, to_dict, words_of_file
from glmd.errors import ConfigError, GlmdError
from glmd.runtime import phases
from glmd.version import __version__


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
    parser = build_parser()
    options, further = parser.parse_known_args(arguments)
    if "overrides" not in options or any("=" not in each or each.startswith("-") for each in further):
        return parser.parse_args(arguments)  # which refuses what it does not know
    options.overrides += further
    return options


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="glmd",
        description="Distill a large Hugging Face language model into a small one, weights and vocabulary.",
    )
    parser.add_argument("--version", action="version", version=f"glmd {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, function: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(command=function)
        return command

    for name, function, text in (
        ("run", _run, "Run a whole distillation; continue it where it was interrupted."),
        ("compare", _compare, "Run several methods under matched conditions, and their controls, into one table."),
        ("check", _check, "Refuse what can be refused and print the plan; train nothing."),
        ("plan", _plan, "Say what a run will take: memory of a device, disk, FLOPs, tokens, time; read no weights."),
        ("cache", _cache, "Make a run's teacher.cache ahead of it, for this and other students."),
    ):
        command = add(name, function, text)
        command.add_argument(
            "config", nargs="?", help="a YAML file or the name of one in configs/runs (default: quickstart)"
        )
        command.add_argument("overrides", nargs="*", metavar="key=value", help="for example pretraining.max_steps=1000")
        if name == "plan":
            command.add_argument("--devices", type=_positive, default=1, help="that train together (default: 1)")
            command.add_argument(
                "--device-memory", type=_gigabytes, metavar="GB", help="of a GPU (default: what this machine has)"
            )
            command.add_argument(
                "--sharding",
                default="none",
                choices=("none", "fsdp"),
                help="fsdp: split student and teacher over the devices",
            )
            command.add_argument("--measure", action="store_true", help="time the steps on this machine")
            command.add_argument("--json", action="store_true", help="for programs: bytes and seconds")

    command = add("compress", _compress, "Give a model a smaller vocabulary, without training.")
    command.add_argument("model", help="local folder or hub id, with any head")
    command.add_argument("output", type=Path, help="folder to write")
    command.add_argument("--corpus", nargs="+", required=True, help="text or jsonl files, folders, or a data set's id")
    command.add_argument("--keep-ratio", type=float, help="share of the tokens to keep, in (0, 1]")
    command.add_argument("--size", type=_positive, help="or their number")
    command.add_argument(
        "--multiple-of", type=_positive, help="round the number up to a multiple; that of a ratio to 64 by itself"
    )
    command.add_argument("--selection", default="closed", choices=("closed", "free"), help="of merged tokens (BPE)")
    command.add_argument("--mapping", default="inner_product", choices=("inner_product", "cosine", "euclidean", "unk"))
    command.add_argument("--within-class", action="store_true", help="map beginnings of words onto such only")
    command.add_argument("--similarity", default="input", choices=("input", "output"), help="embeddings to map by")
    command.add_argument("--keep-words", nargs="*", default=[], metavar="WORD", help="words that must stay")
    command.add_argument("--keep-words-file", metavar="FILE", help="more of them, one on each line")
    command.add_argument("--corpus-weights", type=float, nargs="*", default=[], metavar="SHARE", help="of each corpus")
    command.add_argument("--text-field", default="text", help="field of jsonl rows")

    task_help = "a task of SuperGLUE, AXb, AXg, or a YAML of your own"
    command = add("evaluate", _evaluate, "Score a model, stock or distilled, on a task or on text.")
    command.add_argument("model", help="folder or hub id of a task model, a masked or a causal LM")
    command.add_argument("--task", help=task_help)
    command.add_argument("--data", help="for --task: a SuperGLUE folder, a jsonl or Parquet file, or aps/super_glue")
    command.add_argument("--split", choices=("train", "val", "test"), help="of --data (default: val)")
    command.add_argument("--batch-size", type=_positive, help="for --task (default: 64)")
    command.add_argument("--text", nargs="+", help="in place of a task: files to measure bits per byte on")
    command.add_argument("--max-length", type=_length, help="tokens, at least 8 (default: the task's; for text 1024)")

    command.add_argument(
        "--tokenizer", choices=("mapped", "stock"), help="for --task (default: mapped); stock: text as without glmd"
    )

    command = add("predict", _predict, "Write a task model's answers in the leaderboard's form.")
    command.add_argument(
        "model", help="folder or hub id of a classifier, a multiple-choice model, a masked or a causal LM"
    )
    command.add_argument("--task", required=True, help=task_help)
    command.add_argument("--max-length", type=_length, help="tokens, at least 8 (default: the task's)")
    command.add_argument("--batch-size", type=_positive, default=64)
    command.add_argument(
        "--file", required=True, help="jsonl in the official form, or the hub's Parquet; labels are not needed"
    )
    command.add_argument("--output", type=Path, required=True, help="jsonl file to write")

    command = add("vocab", _vocab, "Show what each keep ratio covers and saves, to choose one by.")
    command.add_argument("corpus", nargs="+", help="text or jsonl files, folders, or a data set's id")
    command.add_argument("--teacher", required=True, help="local folder or hub id, with any head")
    command.add_argument("--keep-ratios", type=float, nargs="+", help="default: 0.05 to 1")
    command.add_argument("--selection", default="closed", choices=("closed", "free"), help="of merged tokens (BPE)")
    command.add_argument("--mapping", default="inner_product", choices=("inner_product", "cosine", "euclidean", "unk"))
    command.add_argument("--examples", type=_positive, help="show where so many dropped tokens go, at the knee")
    command.add_argument("--text-field", default="text", help="field of jsonl rows")
    command.add_argument("--json", type=Path, help="write the curve to this file too")
    command.add_argument("--picture", type=Path, help="draw it into this .png, .svg or .pdf (needs matplotlib)")

    command = add("verify", _verify, "Check a model folder from weights to tokenizer files; exit code 1 if it fails.")
    command.add_argument("folder", type=Path, help="an exported student, or any folder of a model and its tokenizer")

    command = add(
        "export", _export, "Write a stage's newest checkpoint, or a student in another form, as a model folder."
    )
    command.add_argument("source", type=Path, help="a stage of a run (runs/NAME/pretraining), or a student's folder")
    command.add_argument("output", type=Path, help="folder to write")
    command.add_argument(
        "--kind",
        default="mapped",
        choices=("mapped", "stock", "expanded"),
        help="stock: the stock tokenizer alone; expanded: the source's tokenizer and rows, for models that predict "
        "no words",
    )

    command = add("report", _report, "Print the results of a finished run, or of several as one table.")
    command.add_argument("runs", nargs="+", type=Path, metavar="run", help="run folder, or that of a comparison")
    command.add_argument("--reference", metavar="NAME", help="of several: whose difference to each is shown")
    command.add_argument(
        "--format", choices=("markdown", "latex", "csv", "json"), help="of several, or a comparison (default: markdown)"
    )
    command.add_argument("--picture", type=Path, help="of several: draw it into this .png, .svg or .pdf")
    return parser


def _positive(text: str) -> int:
    """An argument that counts something."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _gigabytes(text: str) -> float:
    """An argument in GB, as bytes."""
    try:
        size = float(text)
    except ValueError:
        size = 0
    if not 0 < size < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of GB above 0")
    return size * 1e9


def _length(text: str) -> int:
    """An argument that is a length in tokens."""
    if _positive(text) < 8:
        raise argparse.ArgumentTypeError(f"{text} tokens leave no room for text; give at least 8")
    return int(text)


def _words(options: argparse.Namespace) -> tuple[str | None, list[str]]:
    """The config and its overrides. `glmd run a=b` has no config: its first word is an override."""
    words = [options.config, *options.overrides] if options.config else list(options.overrides)
    path = words.pop(0) if words and "=" not in words[0] else None
    return path, words


def _config(options: argparse.Namespace) -> RunConfig:
    path, words = _words(options)
    return load_config(path, words)


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
    from glmd.commands.compare import check_comparison, is_comparison

    if is_comparison(*_words(options)):
        say(check_comparison(*_words(options)))
        return
    config = _config(options)
    from glmd.commands.check import describe
    from glmd.data.token_store import require_same_store
    from glmd.pipeline.elastic import processes_of
    from glmd.pipeline.run_folder import require_free_folder, with_dtype_of
    from glmd.planning.limits import require_sizes_and_room
    from glmd.planning.plan import corpus_sources, make_plan
    from glmd.training.fsdp import require_sound_launch

    require_sound_launch(os.environ, config.mixed_precision)
    config = with_dtype_of(config)
    require_free_folder(config)
    cache = []
    with _synthetic(config) as synthetic:
        plan = make_plan(config, synthetic=synthetic)
        launched = os.environ.get("WORLD_SIZE")
        processes, of_the_run = processes_of(plan, None if launched is None else int(launched))
        if plan.corpus is not None and synthetic is None:
            store = Path(config.output_dir) / "corpus"
            require_same_store(store, plan.corpus, plan.tokenizer, text_field=config.data.text_field)
        require_sizes_and_room(plan, synthetic, int(launched or 1))
        if config.teacher.cache is not None:
            from glmd.planning.caches import describe_cache

            cache = [describe_cache(plan, corpus_sources(config, synthetic))]
    say("\n".join([describe(plan, processes), *cache, *of_the_run]))


@contextmanager
def _synthetic(config: RunConfig) -> Iterator[Path | None]:
    """The folder of the synthetic data, for as long as it is read, where the config asks for it."""
    if not config.data.synthetic:
        yield None
        return
    from glmd.data.synthetic import build_synthetic

    with tempfile.TemporaryDirectory() as temporary:
        synthetic = Path(temporary) / "synthetic"
        build_synthetic(synthetic)
        yield synthetic


def _plan(options: argparse.Namespace) -> None:
    from glmd.commands.compare import is_comparison

    if not is_comparison(*_words(options)):
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
        with _synthetic(config) as synthetic:
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
    )
    say(text)


def _evaluate(options: argparse.Namespace) -> None:
    given = [
        name for name in ("task", "data", "split", "tokenizer", "batch_size") if getattr(options, name) is not None
    ]
    scores: Mapping[str, float | str]
    if options.text is not None:
        if given:
            raise ConfigError(f"--{given[0].replace('_', '-')} has no effect beside --text; remove one of them")
        from glmd.commands.evaluate import evaluate_text

        scores = evaluate_text(options.model, options.text, max_length=options.max_length)
    else:
        for name in ("task", "data"):
            if name not in given:
                raise ConfigError(f"--{name} is missing; give --task and --data, or --text for a causal LM")
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
    from glmd.commands.evaluate import predict_file

    count = predict_file(
        options.model,
        options.task,
        options.file,
        options.output,
        max_length=options.max_length,
        batch_size=options.batch_size,
    )
    say(f"{options.output}: answers to {count} examples")


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
    if others or (folder / "comparison.json").is_file():
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

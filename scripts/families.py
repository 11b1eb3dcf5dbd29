"""Try the families in use, each small with a tokenizer of its own class, from the first command to the last.

    python scripts/families.py RESULTS.jsonl                   # all that are not in the file yet; half an hour
    python scripts/families.py RESULTS.jsonl qwen3 xlm-r       # these, again; --corpus TEXT: other text than docs/
    python scripts/families.py RESULTS.jsonl --table docs/architectures.md

Each is made by `family_models.py` and goes through `glmd compress`, `check`, `run`, `export`, `verify` and `evaluate`
in a process of its own, whose memory and time are bounded. Then a fresh process without glmd opens what came out: the
tokenizers must cut text of kept tokens as the teacher's does, and special tokens, chat template and generation config
must say what the teacher's say. Whatever else happens is a fault, and is shown as such.
"""

import argparse
import csv
import functools
import inspect
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

from architectures import FAMILIES as TITLE
from architectures import _line, in_own_process, rows_of, section
from family_models import FAMILIES, NOTES, Family, make_family

from glmd.cli import main as glmd
from glmd.vocabulary.tokenizer import load_tokenizer

SECONDS, STEPS, KEPT = 600, 200, 120
SCORES = ("teacher", "compressed", "student", "mapped", "stock")
DOCS = Path(__file__).resolve().parents[1] / "docs"
RUN = """
output_dir: {folder}/run
teacher: {folder}/model
student: {{num_hidden_layers: 2, initialization: {start}}}
vocabulary: {{keep_ratio: 0.5, mapping: cosine}}
data: {{corpus: ["{folder}/text.txt"], eval_blocks: 8}}
tasks: {tasks}
controls: {{hard_labels: {control}}}
pretraining: {{max_steps: 30, max_length: 48, per_device_train_batch_size: 16, learning_rate: 1e-3, logging_steps: 5}}
"""
TASK = "{{digits: {{train: {folder}/train.csv, val: {folder}/val.csv, text: text, label: label, max_length: 48, num_train_epochs: 2}}}}"  # noqa: E501


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("names", nargs="*", metavar="FAMILY")
    parser.add_argument("--corpus", type=Path, nargs="+", help="text files; the pages of docs/ unless given")
    parser.add_argument("--keep", type=Path, help="a folder in which all that is made stays")
    parser.add_argument("--table", type=Path, help="write the section of the page and try nothing")
    options = parser.parse_args()
    found = last_rows(options.results)
    if options.table:
        text = options.table.read_text(encoding="utf-8").removesuffix(section(options.table, TITLE))
        options.table.write_text(text + written(found), encoding="utf-8")
        return
    texts = lines_of(options.corpus or sorted(DOCS.glob("*.md")))
    for name, family in FAMILIES.items():
        if name in options.names or not (options.names or name in found):
            kept = options.keep.resolve() / name if options.keep else None
            row = {"name": name} | in_own_process(functools.partial(attempt, family, texts, kept), seconds=SECONDS)
            print(f"{name:<12} {row['outcome']:<9} {row['note']}", flush=True)
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    if any(row["outcome"] in ("fault", "not tried") for row in last_rows(options.results).values()):
        raise SystemExit(1)


def last_rows(path: Path) -> dict[str, dict[str, Any]]:
    """What was found of each family at last."""
    return {row["name"]: row for row in rows_of(path)}


def lines_of(files: list[Path]) -> list[str]:
    """Lines of running text."""
    lines = (line.strip() for file in files for line in file.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if len(line) > 40 and not line.startswith(("|", "http"))][:20000]


WHAT = """
What is asked of a family is whether it works with its own tokenizer, from the first command to the last. Each is made
small after its published config, with its layer types, windows, rotations, ties and rows beyond the tokens, and a
tokenizer of its own class, pre-tokenizer, special tokens and chat template, trained on the pages of docs/. Decoders
are trained for {steps} steps; encoders have drawn weights. Then `glmd compress` with half of the tokens, `check` and
`run` (30 steps, half of the layers, half of the tokens, for encoders a task), `export --kind stock`, `verify` on all
that came out, and `evaluate`. A process without glmd opens the compressed model, the student and the stock export:
they must cut and decode text of kept tokens as the teacher's tokenizer does, with its special tokens, frame, chat
template, settings and generation config. Written by `python scripts/families.py RESULTS.jsonl --table
docs/architectures.md`; transformers {transformers}, torch {torch}.

Start is `student.initialization`; the loss is that of pretraining, at its first and last logging. Scores of decoders:
bits per byte of held-out text by the teacher, the compressed teacher and the student, with their stock tokenizers. Of
encoders: the task's accuracy with the mapped and the stock tokenizer. They say that the parts work together, and
nothing of the families.
"""


class Failed(Exception):
    """A command that did not end well, with what it said."""


def command(*words: str) -> str:
    """Run one command of glmd here. Returns what it printed; raises Failed with the last of what it said."""
    out, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(errors):
        try:
            code = glmd(words)
        except SystemExit as end:  # of `glmd verify`, where something does not hold
            code = end.code
    if code != 0:
        failed = [line for line in out.getvalue().splitlines() if line.startswith("FAIL")]
        said = failed or errors.getvalue().strip().splitlines()[-1:]
        raise Failed(f"{'refused' if code == 2 else 'fault'}: glmd {words[0]}: {' / '.join(said)}")
    return out.getvalue()


def attempt(family: Family, texts: list[str], kept: Path | None) -> dict[str, Any]:
    """outcome: works, refused, not tried (a small one could not be made), fault; note: what differs, or why not.

    kept: a folder in which all that is made stays.
    """
    row: dict[str, Any] = {"published": family.published, "class": family.model}
    with tempfile.TemporaryDirectory() if kept is None else nullcontext(str(kept)) as temporary:
        folder = Path(temporary)
        try:
            make_family(family, folder / "model", texts, steps=STEPS)
        except Exception as error:
            return row | {"outcome": "not tried", "note": f"no small one can be made: {_line(error)}"}
        row["tokenizer"] = type(load_tokenizer(folder / "model")).__name__
        try:
            row |= from_first_to_last(family, folder, texts)
            differences = compare(family, folder, texts, row)
        except Failed as error:
            outcome, _, note = str(error).replace(f"{folder}/", "").partition(": ")
            return row | {"outcome": outcome, "note": note[:400]}
        except (Exception, SystemExit) as error:
            return row | {"outcome": "fault", "note": _line(error)}
    return row | {"outcome": "fault" if differences else "works", "note": "; ".join(differences)}


def from_first_to_last(family: Family, folder: Path, texts: list[str]) -> dict[str, Any]:
    """Every command on the family's model. Returns the figures."""
    held = len(texts) // 10
    (folder / "text.txt").write_text("\n\n".join(texts[held:]), encoding="utf-8")
    (folder / "held.txt").write_text("\n\n".join(texts[: min(held, 60)]), encoding="utf-8")
    for name, rows in (("train", texts[held : held + 64]), ("val", texts[:32])):
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            pairs = ((line[:100], "yes" if re.search(r"\d", line[:100]) else "no") for line in rows)
            csv.writer(file).writerows([("text", "label"), *pairs])
    figures: dict[str, Any] = {}
    model, student = folder / "model", folder / "run/pretraining/student"
    corpus = ["--corpus", f"{folder}/text.txt", "--mapping", "cosine"]
    command("compress", str(model), f"{folder}/compressed", *corpus, "--keep-ratio", "0.5")
    figures["start"] = start(folder, with_task=not family.is_decoder)
    command("run", f"{folder}/run.yaml")
    log = (json.loads(line) for line in (folder / "run/log.jsonl").open(encoding="utf-8"))
    losses = [entry["loss"] for entry in log if entry.get("stage") == "pretraining" and "loss" in entry]
    figures["loss"] = [round(losses[0], 3), round(losses[-1], 3)]
    command("export", str(student), f"{folder}/plain", "--kind", "stock")
    verified = [folder / "compressed", student, folder / "plain"]
    if family.is_decoder:
        for name, path in (("teacher", model), ("compressed", folder / "compressed"), ("student", student)):
            words = ["--text", f"{folder}/held.txt", "--max-length", "48"]
            figures[name] = measured(command("evaluate", str(path), *words), "bits_per_byte")
    else:
        task = folder / "run/tasks/digits/seed-0/task_soft_labels/student"
        verified.append(task)
        for name in ("mapped", "stock"):
            words = ["--data", f"{folder}/val.csv", "--tokenizer", name]
            figures[name] = measured(command("evaluate", str(task), *words), "accuracy")
    for path in verified:
        command("verify", str(path))
    return figures


def measured(said: str, name: str) -> float:
    """A figure of what `glmd evaluate` prints."""
    return round(float(dict(line.split(maxsplit=1) for line in said.splitlines())[name]), 2)


def start(folder: Path, *, with_task: bool) -> str:
    """`glmd check` with the first start that it takes."""
    reasons = []
    for each in ("uniform", "even", "first"):
        tasks = TASK.format(folder=folder) if with_task else "{}"
        text = RUN.format(folder=folder, start=each, tasks=tasks, control="false" if with_task else "true")
        (folder / "run.yaml").write_text(text.replace("controls: {hard_labels: true}\n", ""), encoding="utf-8")
        try:
            command("check", f"{folder}/run.yaml")
            return each
        except Failed as error:
            reasons.append(error)
            if "initialization" not in str(error):
                break
    raise reasons[0]


def describe(folder: str, texts: list[str], trust: bool, decoder: bool) -> dict:  # type: ignore[type-arg]
    """What a process without glmd finds in a folder; in names of tokens, which no numbering changes."""
    import torch
    import transformers

    options = {"trust_remote_code": trust}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    auto = transformers.AutoModelForCausalLM if decoder else transformers.AutoModelForMaskedLM
    model = auto.from_pretrained(folder).eval()
    ids = [tokenizer(text)["input_ids"] for text in texts]
    rows = model.config.vocab_size  # what has none can be used by nobody
    added = {str(token): token for i, token in tokenizer.added_tokens_decoder.items() if i < rows}
    facts = {
        "cuts": [tokenizer.convert_ids_to_tokens(row) for row in ids],
        "pair": tokenizer.convert_ids_to_tokens(tokenizer(texts[0], texts[1])["input_ids"]),
        "decodes": [tokenizer.decode(row) for row in ids],
        "without special": [tokenizer.decode(row, skip_special_tokens=True) for row in ids],
        "special tokens": {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())},
        "all special": sorted(added.keys() & set(map(str, tokenizer.all_special_tokens))),
        "added": sorted([name, t.special, t.lstrip, t.rstrip, t.normalized] for name, t in added.items()),
    }
    for name in ("padding_side", "truncation_side", "model_max_length", "model_input_names",
                 "clean_up_tokenization_spaces"):  # fmt: skip
        facts[name] = getattr(tokenizer, name, None)
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": texts[0]}, {"role": "assistant", "content": texts[1]}]
        facts["chat"] = tokenizer.apply_chat_template(chat, tokenize=False)
        facts["asks"] = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
        read = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
        facts["chat marks"] = [token for token in tokenizer.convert_ids_to_tokens(read) if token in added]

    def named(value: object) -> object:
        return [named(each) for each in value] if isinstance(value, list) else tokenizer.convert_ids_to_tokens(value)

    for name, config in (("config", model.config), ("generation config", getattr(model, "generation_config", None))):
        if config is None:
            continue
        saved = config.to_diff_dict() if name != "config" else config.to_dict()
        facts[name] = {
            key: named(value) if key.endswith("_token_id") and value is not None else value
            for key, value in saved.items()
            if not key.startswith("_") and key not in ("transformers_version", "vocab_size", "dtype")
        }
    if decoder:
        asked = tokenizer(texts[0][:30], return_tensors="pt")
        asked.pop("token_type_ids", None)
        given = model.generate(**asked, do_sample=False, max_new_tokens=12, pad_token_id=0)
        said = tokenizer.decode(given[0, asked["input_ids"].shape[1] :])
    else:
        words = texts[0].split(" ")
        asked = tokenizer(" ".join([*words[:3], tokenizer.mask_token, *words[4:]]), return_tensors="pt")
        place = (asked["input_ids"][0] == tokenizer.mask_token_id).nonzero()[0, 0]
        with torch.no_grad():
            said = tokenizer.decode(model(**asked).logits[0, place].topk(5).indices)
    return {"class": type(tokenizer).__name__, "facts": facts, "said": said}


def strange(*asked: tuple[str, list[str], bool, bool]) -> list[dict[str, Any]]:
    """`describe` of folders, in one fresh process without glmd."""
    code = f"import json, sys\n{inspect.getsource(describe)}\n"
    code += "for each in json.load(sys.stdin):\n    print('\\n@' + json.dumps(describe(*each)))\n"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], input=json.dumps(asked), env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise Failed(f"fault: without glmd: {done.stderr.strip().splitlines()[-1]}")
    return [json.loads(line[1:]) for line in done.stdout.splitlines() if line.startswith("@")]


def compare(family: Family, folder: Path, texts: list[str], row: dict[str, Any]) -> list[str]:
    """What of the teacher's peculiarities the folders that came out have lost, on texts of kept tokens."""
    student, plain, wrong = folder / "run/pretraining/student", folder / "plain", []
    kept = kept_texts([student, folder / "compressed"], texts)
    if len(kept) < 10:
        return [f"only {len(kept)} texts of kept tokens"]
    ways = {"compressed": (folder / "compressed", True), "mapped": (student, True)}
    ways |= {"without trust": (student, False), "stock export": (plain, False)}
    asked = [(str(path), kept, trust, family.is_decoder) for path, trust in ways.values()]
    teacher, *others = strange((str(folder / "model"), kept, False, family.is_decoder), *asked)
    for way, other in zip(ways, others, strict=True):
        for name, value in teacher["facts"].items():
            mine = other["facts"].get(name)
            if mine != value and (name != "config" or way == "compressed"):  # a student has fewer layers
                wrong.append(f"{way} ({other['class']}): {name}: {difference(mine, value)}")
    row["said"] = [teacher["said"], *(other["said"] for other in others)]
    row["classes"] = [teacher["class"], *(other["class"] for other in others)]
    return wrong


def kept_texts(folders: list[Path], texts: list[str]) -> list[str]:
    """Beginnings of texts, of three words or more, all of whose tokens each of the folders keeps."""
    tokenizers, found = [load_tokenizer(folder) for folder in folders], []
    source = tokenizers[0].source_tokenizer
    entries = set.intersection(*(set(each.get_vocab()) for each in tokenizers))
    kept = {i for token, i in source.get_vocab().items() if token in entries}
    for text in texts:
        words = text.split(" ")
        beginnings = (" ".join(words[:n]) for n in range(len(words), 2, -1))
        found += [each for each in beginnings if kept.issuperset(source(each)["input_ids"])][:1]
    return found[:KEPT]


def difference(mine: Any, value: Any) -> str:
    if isinstance(value, dict) and isinstance(mine, dict):
        names = [name for name in {**value, **mine} if value.get(name) != mine.get(name)]
        return ", ".join(f"{name} {mine.get(name)!r} in place of {value.get(name)!r}" for name in names[:4])[:300]
    if isinstance(value, list) and isinstance(mine, list):
        pairs = [(a, b) for a, b in zip(mine, value, strict=False) if a != b]
        first = f"{pairs[0][0]!r} in place of {pairs[0][1]!r}" if pairs else f"{len(mine)} in place of {len(value)}"
        return f"{len(pairs)} of {len(value)}, {first}"[:300]
    return f"{mine!r} in place of {value!r}"[:300]


def written(found: dict[str, dict[str, Any]]) -> str:
    """The section of the page."""
    tried = WHAT.format(steps=STEPS, transformers=version("transformers"), torch=version("torch").partition("+")[0])
    lines = [
        "",
        f"## {TITLE}",
        "",
        *(line for part in tried.strip().split("\n\n") for line in [*textwrap.wrap(part, 120), ""]),
    ]
    lines += [
        "| family | after | class | tokenizer, as loaded | works | start | loss | scores |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in FAMILIES:
        if (row := found.get(name)) is not None:
            works = "yes" if row["outcome"] == "works" else f"{row['outcome']}: {row['note']}".replace("|", "/")
            loss = " → ".join(f"{each:.2f}" for each in row.get("loss", ()))
            scores = ", ".join(f"{row[each]:.2f}" for each in SCORES if each in row)
            cells = (name, row["published"], row["class"], row.get("tokenizer", ""), works, row.get("start", ""), loss)
            lines.append(f"| {' | '.join((*cells, scores))} |")
    return "\n".join([*lines, "", *(f"- {each}" for each in NOTES)]) + "\n"


if __name__ == "__main__":
    main()

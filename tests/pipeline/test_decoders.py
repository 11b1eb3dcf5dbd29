"""Causal teachers: distilled on whole text, every position counts, the student is a stock causal LM."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from families import FAMILIES, cloze_form, near_student, one_of

from glmd.cli import main
from glmd.commands.evaluate import evaluate_folder
from glmd.data.batches import Collate, with_positions
from glmd.data.blocks import BlockDataset, block_frame, block_texts
from glmd.data.token_store import build_token_store, open_token_store
from glmd.distillation.distiller import Distiller
from glmd.distillation.methods import load_method
from glmd.distillation.teacher import OnlineTeacher
from glmd.errors import DataError
from glmd.evaluation.bits_per_byte import score_text
from glmd.models.heads import Split
from glmd.pipeline.run import run
from glmd.reporting.report import results_table
from glmd.tasks.dataset import TaskDataset
from glmd.tasks.examples import TaskExample, read_split
from glmd.tasks.forms import task_form
from glmd.tasks.tasks import load_task
from glmd.vocabulary.slicing import slice_model
from glmd.vocabulary.tokenizer import load_tokenizer
from glmd.vocabulary.vocabulary import Vocabulary

DECODERS = ["GPT2LMHeadModel", "LlamaForCausalLM", "MistralForCausalLM"]
SCALED = ["Gemma2ForCausalLM", "CohereForCausalLM", "GraniteForCausalLM"]  # their logits are capped, or scaled


def decoder_run(tiny, models, name: str, folder, *more: str):
    return tiny.config(
        folder, f"teacher={models / name}", f"data.corpus={models / 'corpus.txt'}", "tasks={}",
        "vocabulary.keep_ratio=0.9", "pretraining.max_steps=30", "pretraining.learning_rate=3e-3", *more,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", one_of(DECODERS))
def test_a_decoder_distils_to_a_stock_causal_lm_that_is_nearer_to_its_teacher(name, tiny, models, tmp_path):
    """Its exports are proved in a fresh process, and opened here by the general class."""
    results = run(decoder_run(tiny, models, name, tmp_path / "run"))
    (row,) = results["rows"]
    assert row["lm_scores"]["kl_divergence"] < row["lm_scores_before"]["kl_divergence"]
    assert "masked_accuracy" not in row["lm_scores"], "nothing is masked"
    assert "| bits per byte | with the mapped tokenizer | teacher's |" in " ".join(results_table(results).split())
    assert "student: pretraining, held-out corpus" in results_table(results)
    folder = tmp_path / "run/pretraining/student"
    student = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = load_tokenizer(folder)
    assert type(student).__name__ == name and student.config.num_hidden_layers == 1
    assert len(tokenizer) == student.config.vocab_size
    assert "AutoModelForCausalLM.from_pretrained" in (folder / "README.md").read_text()
    ids = tokenizer("the cat sang over", return_tensors="pt")["input_ids"]
    text = student.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokenizer.decode(text[0]) and int(text.max()) < len(tokenizer)


def test_bits_per_byte_of_a_run_are_those_of_its_folders_on_the_held_out_text(tiny, models, trusting, tmp_path):
    """The text of the last four blocks, coded by the exported student and by the teacher, each with its own tokens."""
    name = DECODERS[1]
    (row,) = run(decoder_run(tiny, models, name, tmp_path / "run"))["rows"]
    source = load_tokenizer(models / name)
    data = BlockDataset(open_token_store(tmp_path / "run/corpus"), source, max_length=16, blocks=range(1), masking=None)
    total = data.store.num_blocks(data.block_length)
    data.blocks = range(total - 4, total)
    texts, measured = block_texts(data, source), {}
    for folder in (models / name, tmp_path / "run/pretraining/student"):
        model, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(folder), load_tokenizer(folder)
        measured[folder.name] = score_text(model, tokenizer, texts, max_length=16, accelerator=Accelerator(cpu=True))
    student = measured["student"]
    assert {key: row["lm_scores"][key] for key in student} == pytest.approx(student, rel=1e-5)
    assert row["lm_scores"]["teacher_bits_per_byte"] == pytest.approx(measured[name]["bits_per_byte"], rel=1e-5)
    assert (
        row["lm_scores_before"].keys() >= student.keys()
        and row["lm_scores_before"]["bits_per_byte"] != student["bits_per_byte"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", SCALED)
def test_a_model_that_scales_its_logits_is_distilled_from_a_cache_and_exported_as_it_is(
    name, tiny, models, trusting, tmp_path
):
    """What a run measures of the student is what stock transformers computes of its folder."""
    config = decoder_run(tiny, models, name, tmp_path / "run", f"teacher.cache={tmp_path / 'cache'}")
    (row,) = run(config)["rows"]
    assert row["lm_scores"]["kl_divergence"] < row["lm_scores_before"]["kl_divergence"]
    folder = tmp_path / "run/pretraining/student"
    student, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), load_tokenizer(folder)
    teacher = transformers.AutoModelForCausalLM.from_pretrained(models / name).eval()
    vocabulary = Vocabulary.load(tmp_path / "run/vocabulary")
    source = load_tokenizer(models / name)
    data = BlockDataset(open_token_store(tmp_path / "run/corpus"), source, max_length=16, blocks=range(1), masking=None)
    total = data.store.num_blocks(data.block_length)
    data.blocks = range(total - 4, total)
    kl = []
    for i in range(4):
        ids = torch.from_numpy(np.asarray(data[0, i]["input_ids"]))[None].long()
        ours = student(input_ids=torch.from_numpy(vocabulary.token_map)[ids]).logits[0].log_softmax(-1)
        theirs = teacher(input_ids=ids).logits[0][:, vocabulary.kept_ids].log_softmax(-1)
        kl += (theirs.exp() * (theirs - ours)).sum(-1).tolist()
    assert row["lm_scores"]["kl_divergence"] == pytest.approx(np.mean(kl), rel=2e-3)  # the cache holds 16 bits
    assert len(tokenizer) == student.config.vocab_size


@pytest.mark.parametrize("name", SCALED)
def test_a_student_equal_to_a_teacher_that_scales_its_logits_loses_nothing(name, models):
    teacher = transformers.AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float64).eval()
    vocabulary = Vocabulary.identity(teacher.config.vocab_size)
    student = slice_model(teacher, vocabulary)
    batch = {"input_ids": torch.arange(12).reshape(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    assert torch.equal(student(**batch).logits, teacher(**batch).logits)
    distiller = Distiller(load_method("glmd")["pretraining"], vocabulary.token_map, language_model=student)
    batch = with_positions(batch | {"predicts": batch["attention_mask"].bool()})
    loss = distiller(batch, OnlineTeacher(teacher, None, vocabulary)(batch)).sum()
    gradients = torch.autograd.grad(loss, list(student.parameters()))
    assert abs(loss.item()) < 1e-10 and max(each.abs().max().item() for each in gradients) < 1e-10


@pytest.mark.parametrize("name", [*DECODERS, *SCALED])
def test_the_loss_is_that_of_whole_models_at_every_position(name, models, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / name)
    teacher = transformers.AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float64).eval()
    student, vocabulary = near_student(teacher, tokenizer)
    kept, token_map = vocabulary.kept_ids, vocabulary.token_map
    store = build_token_store(tmp_path / "store", [str(models / "corpus.txt")], tokenizer)
    data = BlockDataset(store, tokenizer, max_length=16, blocks=range(300), masking=None)
    last = store.num_blocks(data.block_length) - 1
    data.blocks = range(last + 1)
    batch = Collate(0)([data[0, i] for i in (0, 3, last)])  # the last block is a short one
    distiller = Distiller(load_method("glmd")["pretraining"], token_map, language_model=student)
    outputs = OnlineTeacher(teacher, None, vocabulary)(batch)
    got = distiller(batch, outputs)

    valid, mask = batch["attention_mask"].bool(), batch["attention_mask"]
    theirs = teacher(input_ids=batch["input_ids"], attention_mask=mask).logits[..., kept][valid] / 15
    ours = student(input_ids=torch.from_numpy(token_map)[batch["input_ids"]], attention_mask=mask).logits[valid] / 15
    p, log_p, log_q = theirs.softmax(-1), theirs.log_softmax(-1), ours.log_softmax(-1)
    expected = 225 * (p * (log_p - log_q)).sum()
    torch.testing.assert_close(got.double().squeeze(), expected, rtol=1e-5, atol=1e-6)
    parameters = list(student.parameters())
    wanted = torch.autograd.grad(expected, parameters)
    for gradient, plain in zip(torch.autograd.grad(got.sum(), parameters), wanted, strict=True):
        torch.testing.assert_close(gradient, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "before", "after"),
    [("gpt2", [], []), ("llama3", ["<|begin|>"], []), ("llama2", ["<s>"], []), ("t5", [], ["</s>"]),
     ("roberta", ["<s>"], ["</s>"])],
)  # fmt: skip
def test_a_block_is_framed_as_the_tokenizer_frames_a_text(family, before, after):
    tokenizer = FAMILIES[family]()
    start, end = block_frame(tokenizer)
    assert tokenizer.convert_ids_to_tokens(start.tolist()) == before
    assert tokenizer.convert_ids_to_tokens(end.tolist()) == after


@pytest.mark.slow
def test_an_interrupted_run_of_a_decoder_continues_to_the_same_weights(tiny, models, trusting, tmp_path, monkeypatch):
    from glmd.training.trainer import Trainer

    options = ("pretraining.save_steps=4", "pretraining.max_steps=10")
    whole, broken = (decoder_run(tiny, models, DECODERS[1], tmp_path / each, *options) for each in ("whole", "broken"))
    run(whole)
    real, steps = Trainer._step, []

    def dies(self, *arguments):
        steps.append(1)
        if len(steps) == 7:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(Trainer, "_step", dies)
    with pytest.raises(KeyboardInterrupt):
        run(broken)
    monkeypatch.setattr(Trainer, "_step", real)
    run(broken)
    name = "pretraining/student/model.safetensors"
    assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("tasks=[RTE]", "tasks: RTE: a causal teacher is asked to go on; give casting=cloze, or tasks={}"),
        (
            "tasks={COPA: {mlm_probability: 0.2}} casting=cloze",
            "tasks.COPA.mlm_probability is 0.2; a causal teacher reads",
        ),
        ("task_lm.mlm_probability=0.2", "task_lm.mlm_probability is 0.2; a causal teacher reads whole text"),
        ("pretraining.mlm_probability=0.15", "pretraining.mlm_probability is 0.15; a causal teacher reads whole text"),
        ("method=glmd-masked-only", "method glmd-masked-only speaks of masked tokens; a causal teacher has none"),
        ("method=kd", "tasks is empty and method kd has no pretraining"),
    ],
)
def test_what_a_decoder_cannot_do_yet_is_refused(override, says, tiny, models, tmp_path, capsys):
    from glmd.cli import main

    arguments = [
        f"teacher={models / DECODERS[0]}",
        f"data.corpus={models / 'corpus.txt'}",
        "tasks={}",
        *override.split(" casting")[:1],
    ]
    arguments += ["casting=cloze"] if "casting" in override else []
    assert main(["check", str(tiny.root / "run.yaml"), f"output_dir={tmp_path / 'run'}", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_ids_of_the_generation_config_follow_the_students_vocabulary(tiny, models, trusting, tmp_path):
    run(decoder_run(tiny, models, "LlamaForCausalLM", tmp_path / "run", "pretraining.max_steps=1"))
    folder = tmp_path / "run/pretraining/student"
    saved, tokenizer = json.loads((folder / "generation_config.json").read_text()), load_tokenizer(folder)
    for role in ("bos", "eos", "pad"):
        if f"{role}_token_id" in saved:
            assert saved[f"{role}_token_id"] == getattr(tokenizer, f"{role}_token_id")
    assert "eos_token_id" in saved


@pytest.mark.parametrize("name", DECODERS)
def test_no_keys_and_values_are_kept_for_words_that_are_not_generated(name, models):
    model = transformers.AutoModelForCausalLM.from_pretrained(models / name)
    outputs = Split(model).run_backbone({"input_ids": torch.arange(8).reshape(2, 4) + 5})
    assert outputs.past_key_values is None and model.config.use_cache, "the model itself is left as it was"


# Tasks by continuation


def plain_scores(model, tokenizer, example, words: list[str], *, mean: bool = False) -> list[float]:
    """What is asked last, one continuation after the other, each token's logarithm read off the model's own logits."""
    scores = []
    start = block_frame(tokenizer)[0].tolist()
    for i, filled in enumerate(words):
        text, pair = example.texts[i if example.choices else 0]
        first, last = (text, pair) if "\ufdd0" in (pair or "") else (pair, text)
        before, after = last.split("\ufdd0", 1)
        context = (f"{first}\n" if first else "") + before.rstrip()
        text = (f"{first}\n" if first else "") + before + filled
        text += after.replace("\ufdd0", filled) if example.choices else ""
        said = tokenizer(text, add_special_tokens=False)["input_ids"]
        known = len(tokenizer(context, add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([start + said])).logits[0]
        given = logits.log_softmax(-1) if example.choices else logits
        places = torch.arange(len(start) + known, len(start) + len(said))
        of_tokens = given[places - 1, torch.tensor(said[known:])]
        scores.append((of_tokens.mean() if mean else of_tokens.sum()).item())
    return scores


TEXTS = {"premise": "the cat sang over", "hypothesis": "a dark river", "question": "cause"}
ROWS = {
    "RTE": [{**TEXTS, "label": label} for label in ("entailment", "not_entailment")],
    "COPA": [{**TEXTS, "choice1": "light", "choice2": "running stones.", "label": label} for label in (0, 1)],
    "WSC": [
        {
            "text": "the cat sang and the dog saw it",
            "target": {"span1_text": "the cat", "span1_index": 0, "span2_text": "it", "span2_index": 7},
            "candidates": ["the dog", "light paper stones"],
            "label": label,
        }
        for label in (True, False)
    ],
    "ReCoRD": [
        {
            "passage": {"text": "Bird met Stone.", "entities": [{"start": 0, "end": 3}, {"start": 9, "end": 13}]},
            "qas": [{"query": "the @placeholder sang over @placeholder", "idx": i,
                     "answers": [{"start": 0, "end": 3, "text": "Bird"}]}],
        }
        for i in (0, 1)
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("model_name", ["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_a_task_is_scored_by_what_a_causal_model_says_next(name, model_name, models, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / model_name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = transformers.AutoModelForCausalLM.from_pretrained(models / model_name, dtype=torch.float64).eval()
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({**row, "idx": i}) + "\n" for i, row in enumerate(ROWS[name])))
    task = load_task(name, "cloze")
    task = dataclasses.replace(
        task,
        cloze=dataclasses.replace(
            task.cloze, verbalizers=("light", "dark") if task.labels and not task.is_choice else ()
        ),
    )
    examples = read_split(task, str(file), "val", require_labels=True)
    form = task_form(task, kind="causal")
    data = TaskDataset(examples, form, tokenizer, max_length=60)
    assert data.truncated == 0
    batch = Collate(tokenizer.pad_token_id)([data[0, i] for i in range(len(examples))])
    split = Split(model)
    inputs = split.inputs(batch)
    got = form.logits(split, split.run_backbone(inputs), inputs, batch)
    for row, example in zip(got.tolist(), examples, strict=True):
        filled = list(example.choices) or ["light", "dark"]
        expected = plain_scores(model, tokenizer, example, filled, mean=task.mean_over_tokens)
        assert row == pytest.approx(expected, abs=1e-9)
    assert len(set(got[0].tolist())) == got.shape[1], "else this shows nothing"


def test_the_text_without_the_question_is_cut_and_what_is_asked_stays(models):
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / "LlamaForCausalLM")
    asked = TaskExample(0, (("light \ufdd0.", "the cat sang over a dark river"),), 0)
    whole = TaskDataset([asked], cloze_form(kind="causal"), tokenizer, max_length=60)
    short = TaskDataset([asked], cloze_form(kind="causal"), tokenizer, max_length=8)
    assert (whole.truncated, short.truncated) == (0, 1)
    kept = len(short.rows[0]["input_ids"])
    assert kept == 8 and short.rows[0]["input_ids"][-2:].tolist() == whole.rows[0]["input_ids"][-2:].tolist()
    assert short.rows[0]["cloze_ids"].tolist() == [-100] * 7 + [0], "the text ends where the word would come"
    with pytest.raises(DataError, match="the text around the blank has"):
        TaskDataset([asked], cloze_form(kind="causal"), tokenizer, max_length=2)
    gpt2 = transformers.AutoTokenizer.from_pretrained(models / "GPT2LMHeadModel")
    with pytest.raises(DataError, match="nothing stands before the blank"):
        TaskDataset([TaskExample(0, (("\ufdd0 sang", None),), 0)], cloze_form(kind="causal"), gpt2, max_length=20)


@pytest.mark.slow
def test_a_decoder_without_a_pad_token_learns_tasks_to_the_end(tiny, models, trusting, tmp_path):
    teacher = shutil.copytree(models / "GPT2LMHeadModel", tmp_path / "teacher")
    config = json.loads((teacher / "tokenizer_config.json").read_text())
    config.pop("pad_token", None)
    (teacher / "tokenizer_config.json").write_text(json.dumps(config))
    assert transformers.AutoTokenizer.from_pretrained(teacher).pad_token is None
    rows = tmp_path / "copa.jsonl"
    rows.write_text("".join(json.dumps({**row, "idx": i}) + "\n" for i, row in enumerate(ROWS["COPA"])))
    lengths = [f"{stage}.max_length=40" for stage in ("task_teacher", "task_lm", "task_soft_labels")]
    tasks = f"tasks={{COPA: {{train: {rows}, val: {rows}}}}}"
    more = ["casting=cloze", "pretraining.max_steps=1", f"teacher={teacher}", *lengths]
    results = run(decoder_run(tiny, models, "GPT2LMHeadModel", tmp_path / "run", tasks, *more))
    row = next(row for row in results["rows"] if row["stage"] == "task_soft_labels")
    folder = tmp_path / "run/tasks/COPA/seed-0/task_soft_labels/student"
    again = evaluate_folder(str(folder), "COPA", str(rows), "val", max_length=40, batch_size=1)
    assert again["accuracy"] == row["metrics"]["accuracy"]


def test_a_teacher_in_half_precision_is_the_one_that_from_pretrained_gives(
    models, tiny, trusting, tmp_path, monkeypatch
):
    """Rotary frequencies stay in float32 there; a cast of the whole model would round them."""
    import glmd.pipeline.teachers

    seen = []
    real = glmd.pipeline.teachers.load_language_model
    monkeypatch.setattr(
        "glmd.pipeline.teachers.load_language_model",
        lambda *rest, **options: (seen.append(real(*rest, **options)), seen[-1])[1],
    )
    name = models / "LlamaForCausalLM"
    run(
        decoder_run(
            tiny, models, "LlamaForCausalLM", tmp_path / "run", "teacher.dtype=bfloat16", "pretraining.max_steps=1"
        )
    )
    expected = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(seen[0](input_ids=ids).logits, expected(input_ids=ids).logits)
    buffers = dict(seen[0].named_buffers())
    assert buffers and all(buffer.dtype == torch.float32 for name, buffer in buffers.items() if "inv_freq" in name)


@pytest.mark.slow
def test_a_fine_tuned_causal_teacher_serves_another_run(tiny, models, trusting, tmp_path):
    rows = tmp_path / "copa.jsonl"
    rows.write_text("".join(json.dumps({**row, "idx": i}) + "\n" for i, row in enumerate(ROWS["COPA"])))
    lengths = [f"{stage}.max_length=40" for stage in ("task_teacher", "task_lm", "task_soft_labels")]
    more = ["casting=cloze", "pretraining.max_steps=1", *lengths, "controls.hard_labels=false"]
    more += [f"tasks={{COPA: {{train: {rows}, val: {rows}}}}}"]
    first = run(decoder_run(tiny, models, "LlamaForCausalLM", tmp_path / "a", *more))
    teacher = f"teacher.tasks.COPA={tmp_path / 'a/tasks/COPA/task_teacher/model'}"
    second = run(decoder_run(tiny, models, "LlamaForCausalLM", tmp_path / "b", *more, teacher))
    scores = [
        next(row for row in each["rows"] if row["stage"] == "task_soft_labels")["agreement"] for each in (first, second)
    ]
    assert scores[0] == scores[1]


def test_a_candidate_without_tokens_is_refused_by_causal_models_too(models):
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / "LlamaForCausalLM")
    asked = TaskExample(0, (("so \ufdd0", None),) * 2, 0, choices=("light", ""))
    with pytest.raises(DataError, match="has no tokens"):
        TaskDataset([asked], cloze_form(kind="causal"), tokenizer, max_length=20)


@pytest.mark.slow
def test_a_decoder_learns_tasks_and_is_scored_as_in_its_table(tiny, models, trusting, tmp_path, capsys):
    definition = tmp_path / "rte.yaml"
    definition.write_text(
        "name: RTE\nfolder: RTE\nhub_name: rte\nfields: [premise, hypothesis]\ntext: '{premise}'\n"
        "text_pair: '{hypothesis}'\nlabels: [entailment, not_entailment]\nmetrics: [accuracy]\nmax_length: 60\n"
        "cloze: {text: '{hypothesis} ? {blank}', text_pair: '{premise}', verbalizers: [light, dark]}\n"
    )
    config = decoder_run(
        tiny, models, "GPT2LMHeadModel", tmp_path / "run", f"tasks={{RTE: {{definition: {definition}}}}}",
        "casting=cloze", "pretraining.max_steps=2",
        *(f"{stage}.max_length=60" for stage in ("task_teacher", "task_lm", "task_soft_labels")),
    )  # fmt: skip
    results = run(config)
    rows = {row["stage"]: row for row in results["rows"]}
    assert rows["task_lm"]["lm_scores"]["kl_divergence"] != rows["task_lm"]["lm_scores_before"]["kl_divergence"]
    folder = tmp_path / "run/tasks/RTE/seed-0/task_soft_labels/student"
    model, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), load_tokenizer(folder)
    assert type(model).__name__ == "GPT2LMHeadModel"
    task = load_task(definition, "cloze")
    examples = read_split(task, str(tiny.superglue), "val", require_labels=True)
    right = [
        int(np.argmax(plain_scores(model, tokenizer, example, ["light", "dark"]))) == example.label
        for example in examples
    ]
    assert rows["task_soft_labels"]["metrics"]["accuracy"] == pytest.approx(np.mean(right))
    arguments = ["evaluate", str(folder), "--task", str(definition), "--data", str(tiny.superglue)]
    assert main(arguments) == 0
    assert f"{np.mean(right):.4f}" in capsys.readouterr().out

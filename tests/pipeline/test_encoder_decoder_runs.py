"""Encoder-decoders and GLM from end to end: runs, caches, kills, tasks as what a decoder says, and what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from families import FAMILIES, one_of
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from glmd.cli import main
from glmd.data.batches import Collate
from glmd.data.blank_infilling import glm_tokens
from glmd.errors import ConfigError
from glmd.evaluation.scoring import predict
from glmd.models.glm import GlmdGlmConfig, GlmdGlmForBlankInfilling
from glmd.models.glm.configuration import published_config
from glmd.models.glm.tokenizer import glm_tokenizer
from glmd.pipeline.run import run
from glmd.planning.plan import make_plan
from glmd.planning.run_cost import Layout, run_cost
from glmd.tasks.dataset import TaskDataset
from glmd.tasks.examples import read_split
from glmd.tasks.forms import task_form
from glmd.tasks.tasks import load_task
from glmd.training.trainer import Trainer
from glmd.vocabulary.tokenizer import load_tokenizer

T5, BART, GLM = "T5ForConditionalGeneration", "BartForConditionalGeneration", "GlmdGlmForBlankInfilling"
DEFINITION = """
name: RTE
folder: RTE
hub_name: rte
fields: [premise, hypothesis]
text: '{premise}'
text_pair: '{hypothesis}'
labels: [entailment, not_entailment]
metrics: [accuracy]
max_length: 60
cloze: {text: '{hypothesis} ? {blank}', text_pair: '{premise}', verbalizers: [light, dark]}
"""
STAGES = ("task_teacher", "task_lm", "task_soft_labels")


@pytest.fixture(scope="module")
def teachers(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each kind a teacher that has opinions. T5's output embeddings are a matrix of their own, as in T5 1.1."""
    root = tmp_path_factory.mktemp("teachers")
    for name in (T5, BART):
        model = getattr(transformers, name).from_pretrained(models / name)
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.data += (0.2 if name == T5 else 0.5) * torch.randn_like(parameter)
        shutil.copytree(models / name, root / name)
        # Which T5's config has not unless it is told.
        model.config.decoder_start_token_id = model.config.pad_token_id if name == T5 else model.config.eos_token_id
        model.generation_config.decoder_start_token_id = model.config.decoder_start_token_id
        model.save_pretrained(root / name)
    weights = load_file(root / T5 / "model.safetensors")
    weights["lm_head.weight"] = torch.randn_like(weights["shared.weight"])
    save_file(weights, root / T5 / "model.safetensors", metadata={"format": "pt"})
    backend = FAMILIES["gpt2"]().backend_tokenizer.to_str().replace("<|end|>", "<|endoftext|>")
    tokenizer = glm_tokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(backend)))
    ids = glm_tokens(tokenizer)
    torch.manual_seed(2)
    config = GlmdGlmConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id, mask_token_id=ids.mask,
        bos_token_id=ids.start, eos_token_id=ids.end, initializer_range=0.3,
    )  # fmt: skip
    GlmdGlmForBlankInfilling(config).save_pretrained(root / GLM)
    tokenizer.save_pretrained(root / GLM)
    return root


def words(teachers: Path, models: Path, name: str, folder: Path, *more: str) -> list[str]:
    """Overrides of the tiny run for one of the teachers."""
    return [
        f"output_dir={folder}", f"teacher={teachers / name}", f"data.corpus={models / 'corpus.txt'}", "tasks={}",
        "vocabulary.keep_ratio=0.9", "pretraining.max_steps=30", "pretraining.learning_rate=3e-3", *more,
    ]  # fmt: skip


def config_of(tiny: Any, teachers: Path, models: Path, name: str, folder: Path, *more: str) -> Any:
    return tiny.config(folder, *words(teachers, models, name, folder, *more))


@pytest.mark.slow
@pytest.mark.parametrize("name", one_of([T5, BART, GLM]))
def test_it_distils_to_a_folder_that_is_proved_in_a_fresh_process_and_survives_being_saved_again(
    name, tiny, teachers, models, tmp_path
):
    scratch = "student.initialization=scratch"
    (row,) = run(config_of(tiny, teachers, models, name, tmp_path / "run", scratch))["rows"]
    assert row["lm_scores"]["kl_divergence"] < row["lm_scores_before"]["kl_divergence"]
    folder = tmp_path / "run/pretraining/student"
    auto = transformers.AutoModelForMaskedLM if name == GLM else transformers.AutoModelForSeq2SeqLM
    student, tokenizer = auto.from_pretrained(folder).eval(), load_tokenizer(folder)
    assert type(student).__name__ == name and len(tokenizer) == student.config.vocab_size
    assert f"{auto.__name__}.from_pretrained" in (folder / "README.md").read_text()
    student.save_pretrained(tmp_path / "again")
    again = auto.from_pretrained(tmp_path / "again").eval()
    ids = tokenizer("the cat sang over", return_tensors="pt")["input_ids"]
    more = {} if name == GLM else {"decoder_input_ids": ids}
    torch.testing.assert_close(again(input_ids=ids, **more).logits, student(input_ids=ids, **more).logits)
    if name != GLM:
        said = student.generate(ids, max_new_tokens=4, do_sample=False)
        assert int(said.max()) < len(tokenizer) and (folder / "generation_config.json").is_file()
    if name == T5:
        assert not torch.equal(student.lm_head.weight, student.shared.weight)


@pytest.mark.parametrize("name", one_of([BART, T5, GLM]))
def test_a_cache_gives_the_live_teachers_curve_and_a_killed_run_the_same_bits(
    name, tiny, teachers, models, trusting, tmp_path, monkeypatch
):
    more = ["pretraining.num_maskings=2", "pretraining.max_steps=6", "pretraining.save_steps=2",
            "pretraining.logging_steps=1", "teacher.dtype=bfloat16"]  # fmt: skip
    live = run(config_of(tiny, teachers, models, name, tmp_path / "live", *more))
    step, killed = Trainer._step, []

    def stops(self: Trainer, *arguments: Any) -> Any:
        if arguments[4] == 5 and not killed:
            killed.append(self.stage)
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(Trainer, "_step", stops)
    again = config_of(tiny, teachers, models, name, tmp_path / "killed", *more)
    with pytest.raises(KeyboardInterrupt):
        run(again)
    run(again)
    cached = run(config_of(tiny, teachers, models, name, tmp_path / "cached", *more, f"teacher.cache={tmp_path / 'c'}"))
    weights = [load_file(tmp_path / each / "pretraining/student/model.safetensors") for each in ("live", "killed")]
    assert killed and weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())
    curves = []
    for folder in ("live", "cached"):
        lines = map(json.loads, (tmp_path / folder / "log.jsonl").read_text().splitlines())
        curves.append([line["loss"] for line in lines if "loss" in line])
    assert len(curves[0]) == 6 and curves[1] == pytest.approx(curves[0], rel=5e-3)  # both round to 16 bits
    assert live["rows"][0]["lm_scores"]["agreement"] == pytest.approx(
        cached["rows"][0]["lm_scores"]["agreement"], abs=0.1
    )


def plain_answers(name: str, model: Any, tokenizer: Any, example: Any, words: list[str]) -> list[float]:
    """What each word makes of the decoder's logits, token after token, with transformers' own shift of labels."""
    scores = []
    mark = "<extra_id_0>" if name == T5 else tokenizer.mask_token
    for i, word in enumerate(words):
        texts = [
            (part or "").replace(" \ufdd0", mark).replace("\ufdd0", mark)
            for part in example.texts[i % len(example.texts)]
        ]
        ids = tokenizer(*texts)["input_ids"]
        place = ids.index(tokenizer.convert_tokens_to_ids(mark))
        said = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        before = ids[place : place + 1] if name == T5 else ids[:place]
        with torch.no_grad():
            given = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([[*before, *said]])}
            logits = model(**given).logits[0][len(before) :]
        if not example.choices:
            scores.append(logits[0, said[0]].item())
            continue
        scores.append(sum(logits[n].log_softmax(-1)[token].item() for n, token in enumerate(said)))
    return scores


@pytest.mark.parametrize("name", [T5, BART])
def test_a_task_is_scored_by_what_the_decoder_says_token_after_token(name, teachers, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(teachers / name)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(teachers / name, dtype=torch.float64).eval()

    rows = [{"premise": "the cat sang over", "question": "cause", "choice1": "light", "choice2": "running stones.",
             "hypothesis": "a dark river", "label": i, "idx": i} for i in (0, 1)]  # fmt: skip
    for task_name, words in (("COPA", None), ("RTE", ["light", "dark"])):
        labels = {"RTE": ("entailment", "not_entailment"), "COPA": (0, 1)}[task_name]
        file = tmp_path / f"{task_name}.jsonl"
        file.write_text("".join(json.dumps({**row, "label": labels[row["label"]]}) + "\n" for row in rows))
        task = load_task(task_name, "cloze")
        task = dataclasses.replace(task, cloze=dataclasses.replace(task.cloze, verbalizers=tuple(words or ())))
        examples = read_split(task, str(file), "train", require_labels=True)
        data = TaskDataset(examples, task_form(task, kind="encoder-decoder"), tokenizer, max_length=120)
        ours = predict(model, data, Collate(tokenizer.pad_token_id), token_map=None, accelerator=Accelerator(cpu=True))
        for example, scores in zip(examples, ours, strict=True):
            expected = plain_answers(name, model, tokenizer, example, words or list(example.choices))
            assert scores.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", one_of([f"{BART} head", f"{T5} cloze", f"{T5} head", f"{GLM} cloze"]))
def test_it_learns_tasks_by_what_it_says_or_by_a_head_and_is_scored_as_in_its_table(
    case, tiny, teachers, models, trusting, tmp_path, capsys
):
    name, casting = case.split()
    definition = tmp_path / "rte.yaml"
    definition.write_text(DEFINITION)
    config = config_of(
        tiny, teachers, models, name, tmp_path / "run", f"tasks={{RTE: {{definition: {definition}}}}}",
        f"casting={casting}", "pretraining.max_steps=2", *(f"{stage}.max_length=60" for stage in STAGES),
    )  # fmt: skip
    rows = {row["stage"]: row for row in run(config)["rows"]}
    folder = tmp_path / "run/tasks/RTE/seed-0/task_soft_labels/student"
    arguments = ["evaluate", str(folder), "--task", str(definition), "--data", str(tiny.superglue)]
    assert main(arguments) == 0
    found = capsys.readouterr().out
    assert casting in found.partition("\n")[0].split()
    assert f"{rows['task_soft_labels']['metrics']['accuracy']:.4f}" in found


def test_both_halves_and_all_matrices_are_counted(tiny, teachers, models, tmp_path, capsys):
    config = config_of(
        tiny, teachers, models, T5, tmp_path / "run", "student={num_hidden_layers: 1, num_decoder_layers: 2}"
    )
    plan = make_plan(config)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(teachers / T5)
    assert plan.parameters["teacher"]["total"] == sum(p.numel() for p in model.parameters())
    assert (plan.student_config.num_layers, plan.student_config.num_decoder_layers) == (1, 2)
    assert plan.config.pretraining.mlm_probability == 0.15
    plan = make_plan(config_of(tiny, teachers, models, BART, tmp_path / "run"))
    assert plan.config.pretraining.mlm_probability == 0.3
    assert run_cost(plan, Layout(1)).stages[0].tokens > 0


BAD = [
    (T5, "pretraining.mlm_probability=0.0", "an encoder-decoder learns from what is left out; give 0.15"),
    (T5, "method=pkd tasks=[RTE]", "which is not supported for encoder-decoders; give a method of predictions"),
    (T5, "analysis=layer_distances", "analysis layer_distances is not supported for encoder-decoders"),
    (BART, "task_lm.mlm_probability=0.2", "an encoder-decoder reads tasks whole: remove it"),
    (BART, "student.num_hidden_layers=2", "1 to 1 layers"),
    (
        T5,
        "student.config.num_decoder_layers=1",
        "student.config.num_decoder_layers is set by glmd; give student.num",
    ),
    (
        BART,
        "student.config.encoder_layers=1",
        "student.config.encoder_layers is set by glmd; give student.num_hidden",
    ),
    (T5, "student.num_decoder_layers=9", "student.decoder_initialization and num_decoder_layers: layers 'uniform'"),
    (GLM, "pretraining.mlm_probability=0.6", "blanks that do not touch need room between them; give at most 0.5"),
    (GLM, "casting=head tasks=[RTE]", "a GLM fills blanks; give casting=cloze, or tasks={}"),
    (GLM, "student.num_decoder_layers=1", "num_decoder_layers has no effect: the teacher is no encoder-decoder"),
    (
        T5,
        "pretraining.max_length=40 pretraining.mlm_probability=0.5",
        "spans are more than the tokenizer's 5 sentinel tokens",
    ),
]


@pytest.mark.parametrize(("name", "override", "message"), BAD)
def test_what_they_cannot_do_is_refused_in_check(name, override, message, tiny, teachers, models, tmp_path, capsys):
    more = ["pretraining.max_length=24", *override.split(" ")]
    assert main(["check", str(tiny.root / "run.yaml"), *words(teachers, models, name, tmp_path / "run", *more)]) == 2
    assert message in capsys.readouterr().err


def test_a_decoders_tokenizer_is_refused_for_an_encoder_decoder(tiny, teachers, models, tmp_path, capsys):
    folder = tmp_path / "teacher"
    shutil.copytree(teachers / T5, folder)
    for file in folder.glob("token*"):
        file.unlink()
    tokenizer = FAMILIES["gpt2"]()
    tokenizer.save_pretrained(folder)
    told = transformers.AutoConfig.from_pretrained(folder)
    told.vocab_size = len(tokenizer)  # a row for each, so that none is left out
    told.save_pretrained(folder)
    config = config_of(tiny, tmp_path, models, "teacher", tmp_path / "run")
    with pytest.raises(Exception, match=r"has neither sentinel tokens .* nor a mask token"):
        make_plan(config)


def test_another_models_tokenizer_and_a_classifier_are_refused(tiny, teachers, models, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(teachers / BART, folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    config.eos_token_id = 7
    config.save_pretrained(folder)
    with pytest.raises(ConfigError, match="eos_token_id is 7 in its config and 2 in its tokenizer; they do not belong"):
        make_plan(config_of(tiny, tmp_path, models, "other", tmp_path / "run"))
    folder = tmp_path / "classifier"
    shutil.copytree(teachers / T5, folder)
    model = transformers.T5ForSequenceClassification.from_pretrained(folder)
    model.save_pretrained(folder)
    with pytest.raises(ConfigError, match="holds a T5ForSequenceClassification, which predicts no tokens"):
        make_plan(config_of(tiny, tmp_path, models, "classifier", tmp_path / "run"))


def test_the_papers_pairs_are_checked_from_a_config_alone(tmp_path, capsys):
    for name, size, total in (("glm-t1-s1", "110M", "16,939,776"), ("glm-t2-s2", "340M", "55,113,216")):
        published_config(size).save_pretrained(tmp_path / size)
        arguments = [name, f"teacher.model={tmp_path / size}", "tasks={}", "sweep={}", "data.superglue="]
        assert main(["check", *arguments]) == 0
        assert total in capsys.readouterr().out

"""Bad input is refused: exit code 2 and one line on stderr with the place, what was given and what would work.

Unless a test is about weights, the teacher's folder holds none: a refusal that came after a model was loaded
would be another one.
"""

import json
import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from glmd.cli import main

SAVE_AGAIN = "save the model with save_pretrained (pickles are not read)"


@pytest.fixture
def bare_teacher(tiny, tmp_path) -> Path:
    """The teacher's folder without its weights."""
    return shutil.copytree(tiny.teacher, tmp_path / "teacher", ignore=shutil.ignore_patterns("*.safetensors"))


@pytest.fixture
def refusal(tiny, tmp_path, capsys):
    """`refusal("seeds=[]", teacher=FOLDER)`: the one line that `glmd run` answers, with exit code 2."""

    def run(*overrides: str, teacher: Path | str = tiny.teacher, command: str = "run", code: int = 2) -> str:
        capsys.readouterr()
        # The caller's overrides come last, so that they win.
        arguments = [f"output_dir={tmp_path / 'run'}", f"teacher={teacher}", *overrides]
        assert main([command, str(tiny.root / "run.yaml"), *arguments]) == code
        out, err = capsys.readouterr()
        # A step with a NaN is logged before it is refused.
        err = "".join(line for line in err.splitlines(keepends=True) if " step 2  losses [nan]" not in line)
        assert out == "" and err.startswith("glmd: ")
        lines = err.splitlines()
        assert len(lines) == 1, err
        return lines[0].removeprefix("glmd: ")

    return run


# --- Settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize(
    ("override", "kind", "expected"),
    [
        ("pretraining.learning_rte=1", "ConfigError", "pretraining.learning_rte is unknown; did you mean"),
        ("vocabulary.keep_ratio=1.5", "ConfigError", "vocabulary.keep_ratio must be in (0, 1], got 1.5"),
        ("vocabulary.keep_ratio=0", "ConfigError", "vocabulary.keep_ratio must be in (0, 1], got 0"),
        ("vocabulary.keep_ratio=", "ConfigError", "vocabulary.keep_ratio is missing; 0.5 is the paper's"),
        ("method=glmdd", "ConfigError", "method 'glmdd' is unknown; did you mean glmd?"),
        ("method=my.yaml", "ConfigError", "my.yaml: no such file"),
        ("tasks=[RTEE]", "ConfigError", "task 'RTEE' is unknown; did you mean RTE?"),
        ("tasks=[RTE, rte]", "ConfigError", "names a task twice"),
        ("tasks.RTE.inptus=a", "ConfigError", "tasks.RTE.inptus is unknown; did you mean inputs?"),
        ("tasks.RTE.inputs=''", "ConfigError", "tasks.RTE.inputs is empty; give a path"),
        ("vocabulary.size=40", "ConfigError", "keep_ratio and size are both given; keep one (keep_ratio= removes it)"),
        ("vocabulary.similarity=output", "ConfigError", "output has no effect: BertForMaskedLM has one matrix"),
        ("vocabulary={keep_ratio: 1, teacher_mass: merge}", "ConfigError", "merge has no effect: every token is kept"),
        ("vocabulary={keep_ratio: 1, teacher_reads: mapped}", "ConfigError", "mapped has no effect: every token is"),
        ("vocabulary={keep_ratio: 1, within_class: true}", "ConfigError", "within_class has no effect: every token is"),
        ("vocabulary={keep_ratio: .6, mapping: unk, within_class: true}", "ConfigError", "has no effect beside"),
        ("vocabulary.corpus_weights=[1, 2]", "ConfigError", "corpus_weights has 2 numbers, data.corpus 1 sources"),
        ("vocabulary.corpus_weights=[0]", "ConfigError", "vocabulary.corpus_weights must be above 0, got [0.0]"),
        ("vocabulary.keep_words=absent.txt", "ConfigError", "vocabulary.keep_words: absent.txt cannot be read (No"),
        ("data.text_field=body", "DataError", "text_field 'body' has no effect: the corpus is .txt files alone"),
        ("data.corpus=[]", "ConfigError", "data.corpus is missing; method glmd pretrains on it"),
        ("data.corpus=absent.txt", "DataError", "absent.txt: no such file or folder"),
        ("data.superglue=", "ConfigError", "data.superglue is missing; RTE is read from it"),
        ("data.superglue=absent/", "DataError", "absent/: no such folder"),
        ("pretraining.max_length=65", "ConfigError", "pretraining.max_length is 65, the teacher has 64 positions"),
        ("task_soft_labels.max_length=128", "ConfigError", "is 128, the teacher has 64 positions; give at most 64"),
        ("task_soft_labels.mlm_probability=0.15", "ConfigError", "task_soft_labels.mlm_probability has no effect"),
        ("task_lm.num_maskings=4", "ConfigError", "task_lm.num_maskings has no effect: nothing is masked"),
        ("tasks.RTE.num_maskings=4", "ConfigError", "tasks.RTE.num_maskings has no effect: nothing is masked"),
        ("teacher.cache=' '", "ConfigError", "teacher.cache is empty; give a folder"),
        ("teacher.cache=c", "ConfigError", "pretraining.num_maskings is missing; with teacher.cache the texts are"),
        ("teacher.cache=/proc/c", "ConfigError", "teacher.cache /proc/c cannot be written"),
        ("teacher.cache=/dev/null", "ConfigError", "teacher.cache /dev/null is a file"),
        ("student.num_hidden_layers=3", "ConfigError", "3"),
        ("student.config.hiden_size=8", "ConfigError", "student.config.hiden_size is unknown"),
        ("student.initialization=[5]", "ConfigError", "5"),
        ("student.initialization=[0, 1]", "ConfigError", "names 2 layers, num_hidden_layers is 1"),
        ("teacher.tasks={RTE: ./absent}", "ModelError", "teacher.tasks.RTE: ./absent is no folder"),
        ("student.config.hidden_size=wide", "ConfigError", "student.config.hidden_size: 'wide' does not fit"),
        ("student.config.pad_token_id=3", "ConfigError", "student.config.pad_token_id is set by glmd"),
        ("student.config.max_position_embeddings=31", "ConfigError", "is 32, the student has 31 positions"),
        ("task_lm.num_train_epochs=.inf", "ConfigError", "num_train_epochs must be in (0, 1,000,000], got inf"),
        ("vocabulary={size: 87}", "ConfigError", "size is 87, but there are 86 tokens"),
        ("vocabulary.multiple_of=87", "ConfigError", "multiple_of is 87, more than the 86 tokens there are"),
        ("data.corpus=['']", "ConfigError", "data.corpus has an empty entry"),
        ("data.corpus=[a.txt, a.txt]", "ConfigError", "data.corpus names a source twice"),
        ("tasks=[RTE, RTE]", "ConfigError", "tasks names a task twice"),
        ("report_to=[wandb, wandb]", "ConfigError", "report_to has a value twice"),
        ("teacher.revision=main", "ConfigError", "teacher.revision has no effect on the folder"),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_is_refused_without_weights(refusal, bare_teacher, command, override, kind, expected):
    message = refusal(override, teacher=bare_teacher, command=command)
    assert message.startswith(f"{kind}: ") and expected in message


def test_uncorrupted_input_is_refused_where_only_corrupted_tokens_are_distilled(refusal, bare_teacher):
    message = refusal("method=glmd-masked-only", "pretraining.mlm_probability=0", teacher=bare_teacher)
    assert "pretraining.mlm_probability is 0, but method glmd-masked-only speaks of masked tokens" in message


def test_a_cache_that_nothing_reads_or_that_lies_in_its_run_is_refused(refusal, bare_teacher, tmp_path):
    message = refusal("method=hard", "teacher.cache=c", teacher=bare_teacher)
    assert "teacher.cache has no effect: method hard needs no teacher" in message
    message = refusal("method=hard", "vocabulary.teacher_reads=mapped", teacher=bare_teacher)
    assert "teacher_reads mapped has no effect: method hard asks nothing of a teacher" in message
    message = refusal("teacher.cache=c", "vocabulary.teacher_reads=mapped", teacher=bare_teacher)
    assert "teacher.cache keeps answers to all tokens" in message
    place = tmp_path / "run"
    message = refusal(f"output_dir={place}", f"teacher.cache={place}/pretraining/c", teacher=bare_teacher)
    assert "lies in output_dir" in message


def test_an_unknown_run_is_refused_with_the_nearest(capsys):
    assert main(["run", "minilm-superglu"]) == 2
    assert capsys.readouterr().err.count("did you mean minilm-superglue?") == 1


def test_a_method_file_is_refused_by_stage_term_and_key(refusal, bare_teacher, write):
    path = write("mine.yaml", "task_soft_labels:\n  - {signal: task_logits, loss: kl_divergence, temprature: 2}\n")
    message = refusal(f"method={path}", teacher=bare_teacher)
    expected = (
        f"{path}: task_soft_labels[0].temprature has no effect on task_logits kl_divergence; did you mean temperature?"
    )
    assert message == f"ConfigError: {expected}"


# --- Teachers -----------------------------------------------------------------------------------------------------


def test_a_teacher_that_is_not_there_is_refused(refusal, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    assert refusal(teacher="./absent") == (
        "ModelError: teacher.model: ./absent is no folder; give a folder with config.json, or a hub id"
    )
    assert "is no folder" in refusal(teacher=tmp_path / "file")
    assert f"{tmp_path / 'empty'} has no config.json" in refusal(teacher=tmp_path / "empty")


def test_a_student_that_is_not_trained_yet_is_no_teacher(refusal, tmp_path):
    (tmp_path / "earlier/pretraining/checkpoints/step-000002").mkdir(parents=True)
    message = refusal(teacher=tmp_path / "earlier/pretraining/student")
    assert f"the stage at {tmp_path / 'earlier/pretraining'} is in progress and has left no student yet" in message


def test_a_hub_id_without_internet_is_refused(refusal):
    message = refusal(teacher="nobody/no-such-model")
    assert message.startswith("ModelError: nobody/no-such-model") and message.endswith(
        "without internet give a local folder"
    )


def test_a_config_that_is_no_model_is_refused(refusal, bare_teacher):
    (bare_teacher / "config.json").write_text('{"model_type": "bertt"}')
    assert str(bare_teacher) in refusal(teacher=bare_teacher)
    (bare_teacher / "config.json").write_text("{")
    assert str(bare_teacher) in refusal(teacher=bare_teacher)


def change_tokenizer(folder: Path, change) -> None:
    from transformers import BertTokenizer

    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    options = change(vocabulary) or {}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    BertTokenizer(vocab=vocabulary, **options).save_pretrained(folder)


@pytest.mark.parametrize(("token", "expected"), [("pad_token", "no pad token"), ("mask_token", "no mask token")])
def test_a_tokenizer_without_pad_or_mask_token_is_refused(refusal, bare_teacher, token, expected):
    path = bare_teacher / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings[token] = None
    path.write_text(json.dumps(settings))
    assert expected in refusal(teacher=bare_teacher)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(refusal, bare_teacher):
    change_tokenizer(bare_teacher, lambda vocabulary: vocabulary.update(more=len(vocabulary)))
    message = refusal(teacher=bare_teacher)
    assert "its tokenizer has 87 tokens, its embeddings 86 rows; they do not belong together" in message


def test_a_folder_without_tokenizer_is_refused(refusal, bare_teacher):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare_teacher / name).unlink()
    assert str(bare_teacher) in refusal(teacher=bare_teacher)


@pytest.fixture
def bare_classifier(bare_teacher, tmp_path) -> Path:
    """A classifier for RTE as a folder without weights."""
    folder = shutil.copytree(bare_teacher, tmp_path / "classifier")
    labels = {"0": "entailment", "1": "not_entailment"}
    change_config(folder, id2label=labels, architectures=["BertForSequenceClassification"])
    return folder


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_fine_tuned_teacher_with_another_tokenizer_is_refused(refusal, bare_teacher, bare_classifier):
    """Of the same size: two words changed places, which no shape would show."""

    def swap(vocabulary):
        first, second = list(vocabulary)[-2:]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]

    change_tokenizer(bare_classifier, swap)
    message = refusal(f"teacher.tasks.RTE={bare_classifier}", teacher=bare_teacher)
    assert f"teacher.tasks.RTE: {bare_classifier}: its tokenizer (86 tokens) differs from the teacher's" in message


@pytest.mark.parametrize(
    "labels", [{"0": "not_entailment", "1": "entailment"}, {"0": "a", "1": "b", "2": "c"}], ids=["swapped", "three"]
)
def test_a_fine_tuned_teacher_with_other_classes_is_refused(refusal, bare_teacher, bare_classifier, labels):
    change_config(bare_classifier, id2label=labels)
    message = refusal(f"teacher.tasks.RTE={bare_classifier}", teacher=bare_teacher)
    assert f"{bare_classifier}: its classes {list(labels.values())} are not those of RTE in this order" in message


# --- Data ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def superglue(tiny, tmp_path) -> Path:
    return shutil.copytree(tiny.superglue, tmp_path / "superglue")


@pytest.mark.parametrize(
    ("split", "line", "expected"),
    [
        ("train", '{"premise": "a", "hypothesis": "b", "label": "entailm', "train.jsonl:25: not valid JSON"),
        ("val", '{"premise": "a", "hypothesis": "b", "label": "entails"}', "val.jsonl:13: field 'label' must be"),
        ("train", '{"premise": "a", "hypothesis": "b"}', "train.jsonl:25: field 'label' must be one of"),
        ("train", '{"premise": "a", "hypotesis": "b"}', "train.jsonl:25: field 'hypothesis' is missing; did you mean"),
        ("train", '{"premise": 3, "hypothesis": "b", "label": "entailment"}', "field 'premise' must be text, got 3"),
        ("val", '["a"]', "val.jsonl:13: an object {...} is needed, got a list"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_read_is_refused_by_file_and_line(refusal, bare_teacher, superglue, split, line, expected):
    with (superglue / "RTE" / f"{split}.jsonl").open("a") as file:
        file.write(line + "\n")
    message = refusal(f"data.superglue={superglue}", teacher=bare_teacher)
    assert message.startswith(f"DataError: {superglue}") and expected in message


def test_labels_that_only_some_rows_of_val_have_are_refused(refusal, bare_teacher, superglue):
    with (superglue / "RTE" / "val.jsonl").open("a") as file:
        file.write('{"premise": "a", "hypothesis": "b"}\n')
    message = refusal(f"data.superglue={superglue}", teacher=bare_teacher)
    assert f"DataError: {superglue}: 1 of 13 rows of RTE val have no label; give all or none" in message
    message = refusal(f"data.superglue={superglue}", "selection=best", teacher=bare_teacher)
    assert f"{superglue / 'RTE' / 'val.jsonl'}:13: field 'label' must be one of" in message


@pytest.mark.slow
def test_a_training_file_that_nothing_learns_from_is_refused(refusal, tiny, finished):
    rows = tiny.superglue / "RTE" / "train.jsonl"
    message = refusal(
        f"tasks.RTE={{inputs: {rows}, train: {rows}}}",
        f"teacher.tasks.RTE={finished.folder / 'tasks/RTE/task_teacher/model'}",
        "controls.hard_labels=false",
        teacher=tiny.teacher,
    )
    assert "tasks.RTE.train has no effect beside inputs and a named teacher; remove it" in message


def test_a_missing_split_is_refused_with_what_is_there(refusal, bare_teacher, superglue):
    (superglue / "RTE" / "val.jsonl").unlink()
    message = refusal(f"data.superglue={superglue}", teacher=bare_teacher)
    assert f"{superglue / 'RTE' / 'val.jsonl'}: no such file; {superglue / 'RTE'} holds train.jsonl" in message


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("corpus.txt", "", "the file holds no text"),
        ("corpus.jsonl", "", "the file holds no rows"),
        ("corpus.jsonl", '{"text": "a"}\n{"txt": "b"}\n', "corpus.jsonl:2: field 'text' is missing; did you mean"),
        ("corpus.csv", "a,b\n", "a corpus file ends in .txt, .jsonl or .parquet"),
        ("corpus.jsonl.gz", "a bomb", "a corpus file ends in .txt, .jsonl or .parquet"),
        ("corpus.txt", "a b c\n", "at least 5 are needed: give more text, or a smaller max_length"),
    ],
)
def test_a_corpus_that_gives_no_blocks_is_refused(refusal, tiny, write, name, text, expected):
    assert expected in refusal(f"data.corpus=[{write(name, text)}]", teacher=tiny.teacher)


# --- Weights ------------------------------------------------------------------------------------------------------


def copy_with_weights(tiny, folder: Path, change) -> Path:
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny.teacher, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("command", ["run", "check"])
def test_weights_of_more_layers_than_the_config_names_are_refused(refusal, tiny, tmp_path, command):
    folder = shutil.copytree(tiny.teacher, tmp_path / "teacher")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    message = refusal(teacher=folder, command=command)
    assert "16 weights that its config has no place for (bert.encoder.layer.1." in message


def test_a_named_teacher_without_a_task_head_is_refused_before_anything_is_trained(refusal, tiny, bare_teacher):
    message = refusal(f"teacher.tasks={{RTE: {tiny.teacher}}}", teacher=bare_teacher)
    assert f"ModelError: {tiny.teacher}: holds a BertForMaskedLM; RTE needs a model for SequenceClass" in message


def test_a_tracker_that_is_not_installed_is_refused(refusal, bare_teacher, monkeypatch):
    monkeypatch.setattr("accelerate.utils.is_wandb_available", lambda: False)
    assert "report_to: wandb is not installed; pip install wandb" in refusal("report_to=[wandb]", teacher=bare_teacher)


def test_weights_that_are_cut_short_are_refused(refusal, tiny, tmp_path):
    folder = shutil.copytree(tiny.teacher, tmp_path / "teacher")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    message = refusal(teacher=folder)
    assert message.startswith(f"ModelError: {weights}: is damaged (") and message.endswith("; copy it again")


@pytest.mark.parametrize("command", ["run", "check"])
def test_absent_weights_are_refused_before_anything_is_trained(refusal, bare_teacher, bare_classifier, tiny, command):
    message = refusal(teacher=bare_teacher, command=command)
    assert message == f"ModelError: {bare_teacher}: holds no model.safetensors; {SAVE_AGAIN}"
    message = refusal(f"teacher.tasks.RTE={bare_classifier}", command=command)
    assert message == f"ModelError: {bare_classifier}: holds no model.safetensors; {SAVE_AGAIN}"
    index = bare_teacher / "model.safetensors.index.json"
    shutil.copy(tiny.teacher / "model.safetensors", bare_teacher / "part-1.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}))
    message = refusal(teacher=bare_teacher, command=command)
    assert message == f"ModelError: {bare_teacher}: holds no part-2.safetensors; {SAVE_AGAIN}"


def test_a_named_teacher_with_fewer_positions_than_its_task_has_tokens_is_refused(refusal, tiny, bare_classifier):
    change_config(bare_classifier, max_position_embeddings=31)
    message = refusal(f"teacher.tasks.RTE={bare_classifier}")
    assert "task_teacher.max_length of RTE is 32, teacher.tasks.RTE has 31 positions; give at most 31" in message


def test_a_length_that_no_stage_of_the_method_has_is_not_refused(tiny, tmp_path):
    overrides = ["method=kd", "pretraining.max_length=900", "task_lm.max_length=900", "data.corpus=[]"]
    assert main(["check", str(tiny.root / "run.yaml"), f"output_dir={tmp_path / 'run'}", *overrides]) == 0


def test_pairs_that_are_none_are_refused_before_anything_is_trained(refusal, tiny, bare_teacher, write):
    definition = write(
        "pairs.yaml",
        "name: RTE\nfolder: RTE\nhub_name: rte\nfields: [premise, hypothesis]\ntext: '{premise}'\n"
        "text_pair: '{hypothesis}'\nlabels: [entailment, not_entailment]\ngroup_by: [premise]\n"
        "metrics: [accuracy, gender_parity]\nmax_length: 32\n",
    )
    message = refusal(f"tasks.RTE.definition={definition}", teacher=bare_teacher)
    assert message.startswith("DataError: gender_parity: a pair has two examples;")


def test_weights_that_are_a_pickle_are_refused(refusal, tiny, bare_teacher):
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(tiny.teacher / "model.safetensors"), bare_teacher / "pytorch_model.bin")
    assert refusal(teacher=bare_teacher) == f"ModelError: {bare_teacher}: holds no model.safetensors; {SAVE_AGAIN}"


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_checkpoint_without_language_model_head_is_refused(refusal, tiny, tmp_path, command):
    """from_pretrained would draw the head at random and go on."""

    def behead(tensors):
        for key in [key for key in tensors if key.startswith("cls.")]:
            del tensors[key]

    message = refusal(teacher=copy_with_weights(tiny, tmp_path / "teacher", behead), command=command)
    assert "BertForMaskedLM needs" in message and "they would be random" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(refusal, tiny, tmp_path, value):
    def spoil(tensors):
        tensors["bert.embeddings.word_embeddings.weight"][3, 1] = value

    message = refusal(teacher=copy_with_weights(tiny, tmp_path / "teacher", spoil))
    assert "bert.embeddings.word_embeddings.weight holds values that are not finite" in message


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_weight_of_another_shape_is_refused(refusal, tiny, tmp_path, command):
    def narrow(tensors):
        tensors["bert.encoder.layer.0.output.dense.bias"] = tensors["bert.encoder.layer.0.output.dense.bias"][
            :-1
        ].clone()

    message = refusal(teacher=copy_with_weights(tiny, tmp_path / "teacher", narrow), command=command)
    assert "weights of another shape than its config says" in message and "layer.0.output.dense.bias" in message


@pytest.mark.parametrize("command", ["run", "check"])
def test_two_matrices_that_the_config_calls_one_are_refused(refusal, tiny, tmp_path, command):
    def untie(tensors):
        tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"] + 1

    message = refusal(teacher=copy_with_weights(tiny, tmp_path / "teacher", untie), command=command)
    assert "config says tie_word_embeddings, but its weights hold two different matrices" in message


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_classifier_given_as_the_teacher_is_refused_with_its_place(refusal, finished, command):
    classifier = finished.folder / "tasks/RTE/task_teacher/model"
    message = refusal(teacher=classifier, command=command)
    assert f"{classifier} holds a BertForSequenceClassification, which predicts no tokens" in message
    remedy = f"teacher=BASE teacher.tasks.RTE={classifier}; or method=soft-labels, which learns its answers alone"
    assert message.endswith(remedy)


def test_classes_without_names_are_said_to_be_taken_in_the_tasks_order(finished, tiny, tmp_path, caplog):
    folder = shutil.copytree(finished.folder / "tasks/RTE/task_teacher/model", tmp_path / "classifier")
    names = {0: "LABEL_0", 1: "LABEL_1"}
    change_config(folder, id2label=names, label2id={name: i for i, name in names.items()})
    words = ["check", str(tiny.root / "run.yaml"), f"output_dir={tmp_path / 'run'}", f"teacher.tasks.RTE={folder}"]
    for name, times in ((folder, 1), (finished.folder / "tasks/RTE/task_teacher/model", 0)):
        caplog.clear()
        assert main([*words[:-1], f"teacher.tasks.RTE={name}"]) == 0
        assert caplog.text.count("they are taken to be those of RTE in this order: entailment, not_entail") == times


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_fine_tuned_teacher_whose_head_is_not_in_its_file_is_refused(refusal, finished, tmp_path, command):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(finished.folder / "tasks/RTE/task_teacher/model", tmp_path / "classifier")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("classifier.bias")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    message = refusal(f"teacher.tasks.RTE={folder}", command=command)
    assert "BertForSequenceClassification needs 1 weight that it does not hold (classifier.bias)" in message


@pytest.mark.parametrize("place", ["../../secret.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_a_weight_index_that_points_outside_is_refused(refusal, bare_teacher, place):
    index = bare_teacher / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"cls.predictions.bias": place}}))
    assert f"{index}: names {place!r}, which is outside the folder" in refusal(teacher=bare_teacher)


def test_a_loss_that_is_not_finite_ends_with_code_3_and_its_examples(refusal):
    message = refusal("pretraining.weight_decay=1e38", "tasks={}", code=3)
    assert message.startswith("NumericsError: pretraining: step ")
    assert "is not finite; examples [" in message and "Lower learning_rate" in message


CODE_OF_A_STRANGER = """
from pathlib import Path
from transformers import BertConfig
Path({!r}).touch()
class TheirConfig(BertConfig):
    model_type = "theirs"
"""


def test_code_of_a_model_folder_is_neither_run_nor_asked_about(refusal, bare_teacher, tmp_path, monkeypatch):
    """Left to its default, transformers asks on the terminal and waits."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    (bare_teacher / "theirs.py").write_text(CODE_OF_A_STRANGER.format(str(tmp_path / "was run")))
    change_config(bare_teacher, model_type="theirs", auto_map={"AutoConfig": "theirs.TheirConfig"})
    message = refusal(teacher=bare_teacher)
    assert message.startswith(f"ModelError: {bare_teacher}: brings Python code of its own, which is not run; read it")
    assert not (tmp_path / "was run").exists()


def test_every_model_and_tokenizer_is_loaded_with_an_explicit_answer_about_its_code(monkeypatch):
    from glmd.models import loading

    class Loads:
        @staticmethod
        def from_pretrained(name, **options):
            return options

    assert loading.from_pretrained(Loads, "a") == {"trust_remote_code": False}
    assert loading.from_pretrained(Loads, "a", trust_remote_code=True) == {"trust_remote_code": True}


# --- Folders ------------------------------------------------------------------------------------------------------


def test_a_folder_with_foreign_files_is_refused_and_left_alone(refusal, bare_teacher, write, tmp_path):
    theirs = write("run/thesis.txt", "ten years of work")
    message = refusal(teacher=bare_teacher)
    assert f"output_dir {tmp_path / 'run'} is not empty and holds no run; choose another output_dir" in message
    assert [path.name for path in theirs.parent.iterdir()] == ["thesis.txt"]


def test_a_refused_run_leaves_its_folder_free(refusal, tmp_path):
    pytest.importorskip("tensorboard")
    assert "./absent is no folder" in refusal("report_to=[tensorboard]", teacher="./absent")
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"lock"}


@pytest.mark.parametrize("command", ["run", "check"])
def test_an_output_dir_that_is_a_file_or_below_one_is_refused(refusal, bare_teacher, write, command):
    path = write("taken", "")
    message = refusal(f"output_dir={path}", teacher=bare_teacher, command=command)
    assert message == f"RunError: output_dir {path} is a file; choose another"
    message = refusal(f"output_dir={path}/run", teacher=bare_teacher, command=command)
    assert message == f"RunError: output_dir {path}/run cannot be written (Not a directory); choose another"


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize(
    ("output_dir", "expected"),
    [
        ("x" * 300, "cannot be written (File name too long)"),
        ("new/" + "x" * 300, "cannot be written (File name too long)"),
        ('"a\\0b"', "output_dir a\\0b holds a NUL character; choose another"),
        ("/proc/glmd", "cannot be written ("),
        ("/proc/glmd/new/run", "cannot be written ("),
    ],
)
def test_an_output_dir_that_cannot_be_made_is_refused(
    refusal, bare_teacher, tmp_path, monkeypatch, command, output_dir, expected
):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    message = refusal(f"output_dir={output_dir}", teacher=bare_teacher, command=command)
    assert message.startswith("RunError: output_dir ") and expected in message
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_folder_of_another_run_is_refused_field_by_field(refusal, finished, command):
    overrides = [f"output_dir={finished.folder}", "pretraining.learning_rate=2e-3", "tasks.RTE.max_length=16"]
    message = refusal(*overrides, command=command)
    assert "holds another run (tasks.RTE.max_length: None -> 16; pretraining.learning_rate: 0.001 -> 0.002)" in message


def test_a_second_run_in_one_folder_is_refused_and_names_the_first(refusal, bare_teacher, write):
    lock = write("run/lock", "process 4711 on thathost\n")
    with FileLock(lock):
        message = refusal(teacher=bare_teacher)
    assert message == f"RunError: output_dir {lock.parent} is in use by process 4711 on thathost"
    assert lock.read_text() == "process 4711 on thathost\n"
    # With the first one gone the folder is free: the next refusal is about the missing weights.
    assert "holds no model.safetensors" in refusal(teacher=bare_teacher)


def test_processes_that_are_no_ranks_are_refused(refusal, bare_teacher, monkeypatch):
    """`accelerate launch --cpu --num_processes 2` starts processes that know nothing of one another."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    message = refusal(teacher=bare_teacher)
    assert message.startswith("RunError: 2 processes were launched, but they are 1 ranks; launch as in")


def test_several_processes_asked_of_the_launcher_that_starts_one_are_refused(refusal, bare_teacher, monkeypatch):
    """`accelerate launch --cpu --num_processes 2` starts one, and gives it a port to meet the other that is none."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    message = refusal(teacher=bare_teacher)
    assert message.startswith("RunError: accelerate launch was asked for several processes and started one")


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize("name", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"])
def test_a_launch_that_shards_otherwise_than_by_fsdp2_is_refused_before_a_model_is_loaded(
    refusal, bare_teacher, monkeypatch, name, command
):
    monkeypatch.setenv(name, "true")  # of FSDP the first version, where none is given
    message = refusal(teacher=bare_teacher, command=command)
    assert message.startswith("ConfigError: accelerate: ") and "fsdp" in message

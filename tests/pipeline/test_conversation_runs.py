"""Instruct models distilled on conversations: whole runs, and their parts against plain loops in float64."""

import json
import shutil
import signal
from collections import Counter
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from chats import CHATML, chat, chats, make_instruct, write_rows
from families import near_student, one_of

from glmd.cli import main
from glmd.config_file import load_config
from glmd.data.batches import Collate
from glmd.data.chats import ConversationDataset, conversation_texts, packing_of
from glmd.data.conversations import ConversationReader
from glmd.data.token_store import build_token_store, open_token_store
from glmd.distillation.distiller import Distiller
from glmd.distillation.methods import load_method
from glmd.distillation.teacher import OnlineTeacher
from glmd.errors import ConfigError, DataError, ModelError
from glmd.evaluation.bits_per_byte import score_conversations
from glmd.evaluation.scoring import score_lm
from glmd.models.probes import prove_texts_apart
from glmd.pipeline.run import run
from glmd.planning.plan import make_plan
from glmd.reporting.report import results_table
from glmd.vocabulary.tokenizer import load_tokenizer

RUN = """
output_dir: replaced
teacher: {teacher}
student: {{num_hidden_layers: 1}}
vocabulary: {{keep_ratio: 0.9}}
data: {{corpus: ["{corpus}"], messages_field: messages, eval_blocks: 4}}
tasks: {{}}
pretraining: {{max_steps: 6, max_length: 128, per_device_train_batch_size: 4, learning_rate: 1e-3, logging_steps: 2,
  save_steps: 2}}
"""


@pytest.fixture(scope="module")
def instruct(tmp_path_factory):
    """A folder with an instruct model, conversations and a run of seconds on both."""
    root = tmp_path_factory.mktemp("instruct")
    teacher, corpus = make_instruct(root), write_rows(root / "chats.jsonl", chats())
    (root / "run.yaml").write_text(RUN.format(teacher=teacher, corpus=corpus))
    return root


def config(instruct, folder, *more: str):
    return load_config(instruct / "run.yaml", [f"output_dir={folder}", *more])


LEARNS = ["pretraining.max_steps=10", "pretraining.learning_rate=3e-3"]


@pytest.fixture(scope="module")
def finished_chat(instruct, tmp_path_factory):
    """The folder and the results of a run; what other processes make of its exports is tested elsewhere."""
    folder = tmp_path_factory.mktemp("chat") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("glmd.pipeline.exports.check_exports", lambda folders: None)
        patch.setattr("glmd.pipeline.run.stranger_ahead", nullcontext)
        return folder, run(config(instruct, folder, *LEARNS))


def test_a_student_of_conversations_is_nearer_to_its_teacher_and_scored_by_role(finished_chat):
    _, results = finished_chat
    (row,) = results["rows"]
    before, after = row["lm_scores_before"], row["lm_scores"]
    assert after["assistant_kl_divergence"] < before["assistant_kl_divergence"]
    roles, figures = ("", "assistant_", "others_"), ("kl_divergence", "agreement", "bits_per_byte")
    assert {f"{role}{name}" for role in roles for name in (*figures, "teacher_bits_per_byte")} <= after.keys()
    table = " ".join(results_table(results).split())
    for shown in ("held-out corpus |", "held-out corpus, assistant's tokens |", "held-out corpus, other tokens |"):
        assert f"| student: pretraining, {shown}" in table


def test_a_student_keeps_the_chat_template_its_tokens_and_its_ends(finished_chat, instruct):
    folder = finished_chat[0] / "pretraining" / "student"
    theirs = load_tokenizer(instruct / "instruct")
    for ours in (load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)):
        messages = chat("the cat", "sang", "over")["messages"]
        assert ours.chat_template == CHATML
        text = ours.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = ours.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        counts = Counter(ours.convert_ids_to_tokens(ids))
        assert (counts["<|im_start|>"], counts["<|im_end|>"]) == (4, 3), "each is one token, and kept"
        ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
        assert ours.convert_ids_to_tokens(ends) == ["<|im_end|>", "<|end|>"]


def test_a_folder_on_conversations_by_command_gives_the_runs_figures(finished_chat, instruct, tmp_path, capsys):
    """On the conversations that the run has held out, none of which it truncated."""
    folder, results = finished_chat
    packed = packing_of(open_token_store(folder / "corpus"), 128, True)
    held_out = [number for block in range(len(packed.ends))[-4:] for number in packed.members(block).tolist()]
    path = write_rows(tmp_path / "held_out.jsonl", [chats()[number] for number in held_out])
    student = str(folder / "pretraining" / "student")
    assert main(["evaluate", student, "--text", str(path), "--messages-field", "messages", "--max-length", "128"]) == 0
    shown = dict(line.split() for line in capsys.readouterr().out.splitlines())
    scores = results["rows"][0]["lm_scores"]
    for name in ("bits_per_byte", "assistant_bits_per_byte", "others_bits_per_byte"):
        assert float(shown[name]) == pytest.approx(scores[name], abs=1e-3)
    assert main(["evaluate", student, "--task", "RTE", "--data", "x", "--messages-field", "messages"]) == 2
    assert "--messages-field has no effect beside --data" in capsys.readouterr().err


def test_a_vocabulary_is_chosen_by_the_tokens_of_conversations(finished_chat, instruct, tmp_path, monkeypatch, capsys):
    """Of the same tokens as the run's, a compressed teacher keeps the same."""
    monkeypatch.setattr("glmd.commands.compress.check_exports", lambda folders: None)
    words = ["compress", str(instruct / "instruct"), str(tmp_path / "cut"), "--keep-ratio", "0.9"]
    words += ["--corpus", str(instruct / "chats.jsonl"), "--messages-field", "messages"]
    assert main(words) == 0
    ours, theirs = (load_tokenizer(each) for each in (tmp_path / "cut", finished_chat[0] / "pretraining" / "student"))
    assert ours.get_vocab() == theirs.get_vocab() and ours.chat_template == CHATML
    words[2] = str(tmp_path / "again")
    assert main([*words, "--text-field", "body"]) == 2
    assert "--text-field has no effect beside --messages-field" in capsys.readouterr().err


def in_parts(instruct, tmp_path, *, max_length: int = 64, loss_on="assistant", packing: bool = True):
    """Teacher and smaller student in float64, and a data set of all conversations."""
    teacher = transformers.AutoModelForCausalLM.from_pretrained(instruct / "instruct", dtype=torch.float64).eval()
    tokenizer = load_tokenizer(instruct / "instruct")
    student, vocabulary = near_student(teacher, tokenizer)
    reader = ConversationReader(tokenizer, "messages")
    store = build_token_store(tmp_path / "store", [str(instruct / "chats.jsonl")], tokenizer, conversations=reader)
    packed = packing_of(store, max_length, packing)
    options = {"max_length": max_length, "blocks": range(len(packed.ends)), "packing": packed}
    data = ConversationDataset(store, loss_on=loss_on, by_role=True, **options)
    return teacher, student, vocabulary, tokenizer, data


def one_at_a_time(teacher, student, vocabulary, data):
    """(kl, same top token, whether an assistant says the next token) of each position with a next one."""
    found = []
    for number in data.numbers.tolist():
        ids, said = data.conversation(number)
        theirs = teacher(input_ids=torch.from_numpy(ids)[None]).logits[0][:-1, vocabulary.kept_ids].log_softmax(-1)
        ours = student(input_ids=torch.from_numpy(vocabulary.token_map[ids])[None]).logits[0][:-1].log_softmax(-1)
        kl = (theirs.exp() * (theirs - ours)).sum(-1)
        found.append((kl, theirs.argmax(-1) == ours.argmax(-1), torch.from_numpy(said[1:])))
    return [torch.cat(column) for column in zip(*found, strict=True)]


def test_scores_by_role_are_those_of_conversations_one_at_a_time(instruct, tmp_path):
    teacher, student, vocabulary, tokenizer, data = in_parts(instruct, tmp_path, loss_on="all")
    assert data.keeps_apart
    accelerator = Accelerator(cpu=True)
    options = {"token_map": vocabulary.token_map, "accelerator": accelerator, "batch_size": 5}
    asked = OnlineTeacher(teacher, None, vocabulary)
    scores = score_lm(student, asked, data, Collate(tokenizer.pad_token_id), **options)
    with torch.no_grad():
        kl, same, said = one_at_a_time(teacher, student, vocabulary, data)
    for role, where in (("", torch.ones_like(said)), ("assistant_", said), ("others_", ~said)):
        assert scores[f"{role}kl_divergence"] == pytest.approx(kl[where].mean().item(), rel=1e-5)
        assert scores[f"{role}agreement"] == pytest.approx(same[where].double().mean().item(), rel=1e-9)


def test_bits_by_role_are_those_of_conversations_one_at_a_time(instruct, tmp_path):
    teacher, _, _, tokenizer, data = in_parts(instruct, tmp_path, loss_on="all", max_length=256)
    texts = conversation_texts(data, tokenizer)
    scores = score_conversations(teacher, tokenizer, texts, max_length=256, accelerator=Accelerator(cpu=True))
    bits, size = np.zeros(2), np.zeros(2)
    for number, (text, turns) in zip(data.numbers.tolist(), texts, strict=True):
        ids, said = data.conversation(number)
        with torch.no_grad():
            logits = teacher(input_ids=torch.from_numpy(ids)[None]).logits[0].log_softmax(-1)
        each = -logits[np.arange(len(ids) - 1), ids[1:]].numpy() / np.log(2)
        spoken = sum(len(text[first:stop].encode()) for first, stop in turns)
        bits += [each[said[1:]].sum(), each[~said[1:]].sum()]
        size += [spoken, len(text.encode()) - spoken]
    assert scores["assistant_bits_per_byte"] == pytest.approx(bits[0] / size[0], rel=1e-6)
    assert scores["others_bits_per_byte"] == pytest.approx(bits[1] / size[1], rel=1e-6)
    assert scores["bits_per_byte"] == pytest.approx(bits.sum() / size.sum(), rel=1e-6)


@pytest.mark.parametrize("packing", one_of([True, False]))
def test_the_loss_and_its_gradients_are_those_of_conversations_one_at_a_time(packing, instruct, tmp_path):
    """On the tokens that an assistant says, whichever share a block."""
    teacher, student, vocabulary, tokenizer, data = in_parts(instruct, tmp_path, packing=packing)
    asked, weights = OnlineTeacher(teacher, None, vocabulary), list(student.parameters())
    objective = load_method("glmd")["pretraining"]
    distiller = Distiller(objective, vocabulary.token_map, language_model=student)
    batch = Collate(tokenizer.pad_token_id)(data.__getitems__([(0, i) for i in range(len(data))]))
    loss = distiller(batch, asked(batch)).sum()
    gradients = torch.autograd.grad(loss, weights)
    (term,) = objective.terms
    temperature = term.options_at(0.0)["temperature"]
    expected = torch.zeros((), dtype=torch.float64)
    for number in data.numbers.tolist():
        ids, said = data.conversation(number)
        where = torch.from_numpy(np.flatnonzero(said[1:]))
        with torch.no_grad():
            theirs = teacher(input_ids=torch.from_numpy(ids)[None]).logits[0][where][:, vocabulary.kept_ids]
        ours = student(input_ids=torch.from_numpy(vocabulary.token_map[ids])[None]).logits[0][where]
        theirs, ours = ((each / temperature).log_softmax(-1) for each in (theirs, ours))
        expected = expected + temperature**2 * (theirs.exp() * (theirs - ours)).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, weights), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7 * theirs.abs().max().item())


@pytest.mark.slow
def test_a_run_that_was_interrupted_ends_in_the_same_weights(finished_chat, instruct, trusting, tmp_path, monkeypatch):
    """With another number of processes that make batches, and its corpus read again."""
    from glmd.training.trainer import Trainer

    real, folder = Trainer._step, tmp_path / "run"

    def step_with_signal(self, model, optimizer, teacher, batches, step, max_steps):
        if step == 3:
            signal.raise_signal(signal.SIGTERM)
        return real(self, model, optimizer, teacher, batches, step, max_steps)

    monkeypatch.setattr(Trainer, "_step", step_with_signal)
    with pytest.raises(SystemExit):
        run(config(instruct, folder, *LEARNS))
    monkeypatch.setattr(Trainer, "_step", real)
    (folder / "corpus" / "manifest.json").unlink()
    run(config(instruct, folder, *LEARNS, "dataloader_num_workers=2"))
    weights = "pretraining/student/model.safetensors"
    assert (folder / weights).read_bytes() == (finished_chat[0] / weights).read_bytes()


@pytest.mark.full
@pytest.mark.slow
def test_a_run_with_another_attention_measures_its_teachers_bits_too(finished_chat, instruct, trusting, tmp_path):
    """By transformers' own choice of attention, as all models are scored."""
    (row,) = run(config(instruct, tmp_path / "run", *LEARNS, "attn_implementation=eager"))["rows"]
    assert row["lm_scores"] == pytest.approx(finished_chat[1]["rows"][0]["lm_scores"], rel=1e-3)


@pytest.mark.full
@pytest.mark.slow
def test_a_cache_of_the_teacher_gives_the_live_teachers_scores(finished_chat, instruct, trusting, tmp_path):
    (row,) = run(config(instruct, tmp_path / "run", *LEARNS, f"teacher.cache={tmp_path / 'cache'}"))["rows"]
    expected = finished_chat[1]["rows"][0]["lm_scores"]
    assert row["lm_scores"] == pytest.approx(expected, rel=2e-2)  # the cache holds 16 bits


@pytest.mark.slow
def test_without_roles_a_run_on_all_tokens_has_no_scores_by_role(instruct, trusting, tmp_path, caplog):
    """One conversation whose turns cannot be told is enough."""
    row = {"messages": [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "cat"}]}
    path = write_rows(tmp_path / "chats.jsonl", [*chats(), row])
    with caplog.at_level("INFO"):
        (row,) = run(config(instruct, tmp_path / "run", f"data.corpus=[{path}]", "data.loss_on=all"))["rows"]
    assert "scores are not given by role" in caplog.text and "chats.jsonl:61: begins with an answer" in caplog.text
    assert not [name for name in row["lm_scores"] if name.startswith(("assistant_", "others_"))]
    assert not open_token_store(tmp_path / "run" / "corpus").has_roles


REFUSED = [
    (["data.messages_field=", "data.loss_on=all"], "loss_on has no effect without messages_field"),
    (["data.messages_field=", "data.packing=false"], "packing has no effect without messages_field"),
    (["data.text_field=body"], "text_field 'body' has no effect beside messages_field"),
    (["data.corpus=[]"], "messages_field has no effect without corpus"),
    (["data.messages_field=mesages"], "field 'mesages' is missing; did you mean messages?"),
    (["data.loss_on=user"], "data.loss_on"),
    (["attn_implementation=flash_attention_2"], "does not keep the conversations of a row apart"),
]


@pytest.mark.parametrize(("more", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_conversations_cannot_have_is_refused_by_check(more, message, instruct, tmp_path, capsys):
    words = [f"output_dir={tmp_path / 'run'}", *more]
    assert main(["check", str(instruct / "run.yaml"), *words]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_blocks_too_short_for_any_answer_are_refused_before_training(instruct, trusting, tmp_path):
    with pytest.raises(DataError, match="no conversation has a token of the assistant's among its first 8; give"):
        run(config(instruct, tmp_path / "run", "pretraining.max_length=8"))


def test_conversations_for_a_masked_teacher_are_refused(tiny, instruct, tmp_path):
    with pytest.raises(ConfigError, match="conversations are of causal LMs"):
        make_plan(config(instruct, tmp_path / "run", f"teacher={tiny.teacher}"))


def test_a_teacher_without_a_chat_template_is_refused(instruct, tmp_path):
    shutil.copytree(instruct / "instruct", tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="has no chat template"):
        make_plan(config(instruct, tmp_path / "run", f"teacher={tmp_path / 'plain'}"))


def test_check_says_the_steps_of_a_run_on_conversations(instruct, tmp_path, capsys):
    assert main(["check", str(instruct / "run.yaml"), f"output_dir={tmp_path / 'run'}"]) == 0
    assert "corpus    conversations in messages, loss on the assistant's tokens, packed" in capsys.readouterr().out


def test_too_few_blocks_of_conversations_are_refused_by_check(instruct, tmp_path, capsys):
    path = write_rows(tmp_path / "few.jsonl", chats(3))
    assert main(["check", str(instruct / "run.yaml"), f"output_dir={tmp_path / 'run'}", f"data.corpus=[{path}]"]) == 2
    assert "at least 5 are needed" in capsys.readouterr().err


@pytest.mark.parametrize("name", one_of(["Gemma2ForCausalLM", "LlamaForCausalLM", "GPT2LMHeadModel"]))
def test_conversations_of_a_row_do_not_see_each_other(name, models):
    prove_texts_apart(transformers.AutoModelForCausalLM.from_pretrained(models / name))


def test_a_model_without_places_of_tokens_is_refused_and_told_of_packing():
    """BLOOM tells tokens apart by how far they are from each other, and takes no places."""
    small = {"vocab_size": 64, "hidden_size": 16, "n_layer": 1, "n_head": 2}
    model = transformers.BloomForCausalLM(transformers.BloomConfig(**small))
    with pytest.raises(ModelError, match=r"BloomForCausalLM: .* give data\.packing=false"):
        prove_texts_apart(model)


@pytest.mark.real
def test_real_conversations_of_a_real_tokenizer_are_told_apart(shared, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared / "data" / "tokenizers" / "smollm2")
    path = write_rows(tmp_path / "a.jsonl", [chat("How are you?", "Fine, thanks.", "Good.", "And you?\n")])
    reader = ConversationReader(tokenizer, "messages")
    (found,) = reader.encode(list(reader.read([str(path)])))
    assert tokenizer.decode(found.ids[found.is_assistant]) == "Fine, thanks.<|im_end|>And you?\n<|im_end|>"
    assert "You are a helpful AI assistant named SmolLM" in tokenizer.decode(found.ids[~found.is_assistant])

"""Try every masked and causal LM of transformers: a small one of each is distilled, exported and opened again.

    python scripts/architectures.py RESULTS.jsonl             # all that are not in the file yet; half an hour
    python scripts/architectures.py RESULTS.jsonl gpt2 bert   # these, again
    python scripts/architectures.py RESULTS.jsonl --table docs/architectures.md

Each is made from its config with drawn weights, 4 layers and 300 tokens, and run through `glmd check` and `glmd run` in
a process of its own, whose memory and time are bounded: 3 steps on text, half of the layers, 80 % of the tokens. So
the split of backbone and head, padding, causality, copied layers, the export and its opening by stock transformers are
proved, or the model is refused in one line. Anything else is a fault of glmd, and is shown as such.
"""

import argparse
import contextlib
import functools
import io
import json
import os
import re
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers.models.auto import modeling_auto as auto

from glmd.config_file import load_config
from glmd.errors import GlmdError
from glmd.models import export
from glmd.pipeline import run as pipeline
from glmd.planning.plan import make_plan

VOCABULARY, LAYERS, SECONDS, GIGABYTES = 300, 4, 120, 12
FAMILIES = "Families in use"  # the section of the page that scripts/families.py writes
PAIRS = {  # others in the list are models of speech and a decoder
    name: found
    for name, found in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.items()
    if getattr(transformers.CONFIG_MAPPING[name](), "is_encoder_decoder", False)
}
KINDS = {
    "masked": {k: v for k, v in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.items() if v not in PAIRS.values()},
    "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "encoder-decoder": PAIRS,
}
AUTO_CLASSES = {"masked": "MaskedLM", "causal": "CausalLM", "encoder-decoder": "Seq2SeqLM"}
LETTERS = "abcdefghijklmnopqrst"
# Sizes by the field's name, the first that fits; only what is larger is made smaller.
SIZES = {
    r"vocab_size(_per_layer_input)?|.*_vocab_size": VOCABULARY,
    r".*key_value_heads|num_kv_heads|n_head_kv|multi_query_group_num": 2,
    r"hidden_size(_per_layer_input)?|d_model|n_embd|(word_)?embed_(proj_)?dim|dim|model_dim|embedding_size|hidden_dim|emb_dim"
    r"|attention_hidden_size|lru_width|d_embed|mamba_d_ssm|true_hidden_size|intra_bottleneck_size|.*_emb(ed)?_size": 32,
    r"((num|n)_)?(hidden_|decoder_|encoder_)?(layers?|blocks)": LAYERS,
    r"((num|n)_)?(linear_|swa_|global_)?(encoder_|decoder_|hidden_|key_|value_)?(attention_)?heads?|mamba_n_heads": 2,
    r"(.*_)?(head_dim|d_kv|head_size|d_head|kv_channels)": 16,
    r"(.*_)?(intermediate_size(_mlp)?|ffn_dim|d_ff|n_inner|inner_dim|d_inner|ffn_hidden_size|mlp_dim|intermediate_dim"
    r"|expert_dim)": 64,
    r"max_position_embeddings|n_positions|max_seq_len|max_sequence_length|n_ctx|seq_length|max_target_positions": 128,
    r"(.*_)?(num|n)_(local_|routed_)?experts|expert_num|zero_expert_num": 4,
    r"(.*_)?(experts_per_tok(en)?|top_?k|num_selected_experts|moe_k)": 2,
    r"n_group|topk_group|num_expert_groups|(mamba_)?n_groups": 1,
    r"(.*_)?lora_rank": 16,
    r"(mamba_)?(ssm_|d_)?state(_size)?|mamba_d_state": 4,
}
IDS = {"pad": 0, "unk": 1, "cls": 2, "bos": 2, "sep": 3, "eos": 3, "mask": 4, "decoder_start": 2, "forced_eos": 3}
# What some need besides.
FIELDS: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2, "attn_layer_indices": [1, 3]},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": ["full_attention"] * LAYERS},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "mamba2": {"num_heads": 4, "head_dim": 16, "expand": 2, "n_groups": 1},
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 16]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "mamba_headdim": 16, "n_mamba_heads": 4},
    "esm": {"position_embedding_type": "absolute", "vocab_size": VOCABULARY},
    "big_bird": {"attention_type": "original_full"},
    "xlm": {"pad_index": 0, "unk_index": 1, "mask_index": 4},
    "flaubert": {"pad_index": 0, "unk_index": 1, "mask_index": 4},
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8, "n_head": 4, "n_embd": 64},
    "whisper": {"begin_suppress_tokens": None, "suppress_tokens": None},
    "nemotron": {"num_key_value_heads": 2},
    "ministral": {"head_dim": 16},
    "esmc": {"vocab_size": VOCABULARY},
    "longt5": {"decoder_start_token_id": 0},
    "t5": {"decoder_start_token_id": 0},
    "switch_transformers": {"decoder_start_token_id": 0},
    "umt5": {"decoder_start_token_id": 0},
    "mt5": {"decoder_start_token_id": 0},
    "marian": {"decoder_vocab_size": VOCABULARY, "pad_token_id": 0, "bad_words_ids": None},
}
RUN = """
output_dir: {folder}/run
teacher: {folder}/model
student: {{num_hidden_layers: 2}}
vocabulary: {{keep_ratio: 0.8, mapping: cosine}}
data: {{corpus: ["{folder}/text.txt"], eval_blocks: 4}}
tasks: {{}}
pretraining: {{max_steps: 3, max_length: 16, per_device_train_batch_size: 4, learning_rate: 1e-3}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("names", nargs="*", metavar="MODEL_TYPE")
    parser.add_argument("--table", type=Path, help="write the page and try nothing")
    options = parser.parse_args()
    found = _read(options.results)
    if options.table:
        kept = section(options.table, FAMILIES)
        options.table.write_text(page(found) + kept, encoding="utf-8")
        return
    prove_exports_here()
    for kind, names in KINDS.items():
        for name, classes in names.items():
            if name in options.names or not (options.names or (kind, name) in found):
                row = {"kind": kind, "name": name, "class": classes if isinstance(classes, str) else classes[0]}
                row |= in_own_process(functools.partial(attempt, kind, name), seconds=SECONDS)
                print(f"{kind:<15} {name:<28} {row['outcome']:<9} {row['note']}"[:160], flush=True)
                with options.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    if any(row["outcome"] == "fault" for row in _read(options.results).values()):
        raise SystemExit(1)


def _read(path: Path) -> dict[tuple[str, str], dict[str, str]]:
    """The last row of each architecture."""
    return {(row["kind"], row["name"]): row for row in rows_of(path)}


def rows_of(path: Path) -> list[dict[str, Any]]:
    """What was found so far; nothing where the file is not there yet."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def in_own_process(attempt: Callable[[], dict[str, Any]], *, seconds: int) -> dict[str, Any]:
    """What `attempt` finds, in a process whose end, whatever it is, is not this one's."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            _, most = resource.getrlimit(resource.RLIMIT_AS)
            bytes_ = GIGABYTES << 30 if most == resource.RLIM_INFINITY else min(GIGABYTES << 30, most)
            resource.setrlimit(resource.RLIMIT_AS, (bytes_, bytes_))
            signal.alarm(seconds)
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                row = attempt()
            os.write(write, json.dumps(row).encode())
        finally:  # this one shall not go on with what its parent does
            os._exit(0)
    os.close(write)
    with os.fdopen(read, encoding="utf-8") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return json.loads(text) if text else {"outcome": "not tried", "note": f"ended by signal {os.WTERMSIG(status)}"}


def attempt(kind: str, name: str) -> dict[str, str]:
    """outcome: works, refused, not tried (a small one could not be made), fault; note: how, or why not."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "text.txt").write_text("\n".join(sentences(400)), encoding="utf-8")
        try:
            make_model(kind, name, folder / "model")
        except Exception as error:
            return {"outcome": "not tried", "note": f"no small one can be made: {_line(error)}"}
        (folder / "run.yaml").write_text(RUN.format(folder=folder), encoding="utf-8")
        reasons: list[str] = []
        for start in ("uniform", "even", "first", "scratch"):
            try:
                distil(folder, start)
            except GlmdError as error:
                reasons.append(_line(error, own=True).replace(f"{folder}/", ""))
                if "initialization" not in reasons[-1]:
                    break
            except (Exception, SystemExit) as error:
                return {"outcome": "fault", "note": _line(error)}
            else:
                how = "" if start == "uniform" else f"student.initialization: {start} ({reasons[0]})"
                return {"outcome": "works", "note": how}
        return {"outcome": "refused", "note": reasons[0]}


def distil(folder: Path, start: str) -> None:
    """`glmd check`, then `glmd run`, whose proof of the exports runs here and not in a process of its own."""
    config = load_config(folder / "run.yaml", [f"student.initialization={start}"])
    make_plan(config)
    pipeline.run(config)


def open_as_a_stranger(folders: list[Path]) -> None:
    given, sys.stdin = sys.stdin, io.StringIO(json.dumps([*map(str, folders)]))
    try:
        exec(export._STRANGER, {})
    finally:
        sys.stdin = given


def prove_exports_here() -> None:
    """Open exports in this process from now on, not in a fresh one for each run."""
    pipeline.stranger_ahead = contextlib.nullcontext  # type: ignore[assignment]
    for name, module in list(sys.modules.items()):
        if name.startswith("glmd.") and hasattr(module, "check_exports"):
            module.check_exports = open_as_a_stranger


def make_model(kind: str, name: str, folder: Path) -> None:
    """A small model with drawn weights, wide enough that each part shows in the output, and a tokenizer."""
    config_class, own = transformers.CONFIG_MAPPING[name], FIELDS.get(name, {})
    if kind == "causal" and "is_decoder" in config_class().to_dict():
        own = own | {"is_decoder": True}
    config = config_class(**small_fields(config_class, own))
    torch.manual_seed(0)
    auto_class = getattr(transformers, f"AutoModelFor{AUTO_CLASSES[kind]}")
    with torch.device("meta"):
        size = sum(each.numel() for each in auto_class.from_config(config).parameters())
    if size > 20e6:
        raise ValueError(f"{size / 1e6:.0f} million parameters")
    model = auto_class.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.isfinite().all():
                parameter.normal_(0, 0.02)
    model.save_pretrained(folder)
    tokenizer(kind).save_pretrained(folder)


def small_fields(config_class: Any, own: dict[str, Any]) -> dict[str, Any]:
    """Arguments for a small config of the class, and of the configs inside it."""
    config, fields = config_class(), {}
    for name in sorted({*vars(config), *config.to_dict(), *getattr(config, "attribute_map", {})}):
        try:
            value = getattr(config, name, None)
        except Exception:  # one for each layer
            continue
        if isinstance(value, transformers.PreTrainedConfig):
            fields[name] = type(value)(**small_fields(type(value), {})).to_dict()
        elif isinstance(value, int) and not isinstance(value, bool):
            small = next((size for pattern, size in SIZES.items() if re.fullmatch(pattern, name)), value)
            if small < value:
                fields[name] = small
        if name.endswith("_token_id"):
            fields[name] = IDS.get(name.removesuffix("_token_id"), 1)
    return {name: value for name, value in fields.items() if name in config.to_dict() or name in vars(config)} | own


def sentences(count: int) -> Iterator[str]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        lengths = torch.randint(1, 4, (12,), generator=generator).tolist()
        letters = torch.rand(40, generator=generator).square().mul(len(LETTERS)).long().tolist()
        yield " ".join("".join(LETTERS[letters[(3 * i + j) % 40]] for j in range(n)) for i, n in enumerate(lengths))


def tokenizer(kind: str) -> Any:
    """WordPiece over letters and pairs of them."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pairs = [a + b for a in LETTERS for b in LETTERS]
    entries = [
        *special,
        *LETTERS,
        *(f"##{letter}" for letter in LETTERS),
        *pairs[:100],
        *(f"##{pair}" for pair in pairs),
    ]
    backend = Tokenizer(models.WordPiece({token: i for i, token in enumerate(entries[:VOCABULARY])}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    roles = {"pad": "[PAD]", "unk": "[UNK]"} | (
        {"bos": "[CLS]", "eos": "[SEP]"} if kind != "masked" else {"cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    )
    roles |= {"mask": "[MASK]"} if kind == "encoder-decoder" else {}
    if kind != "causal":
        frame = [("[CLS]", 2), ("[SEP]", 3)]
        backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", frame)
    names = {f"{role}_token": token for role, token in roles.items()}
    columns = ["input_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=columns, **names)


def _line(error: BaseException, *, own: bool = False) -> str:
    text = " ".join(str(error).split())
    return text[:300] if own else f"{type(error).__name__}: {text}"[:300]


def section(path: Path, title: str) -> str:
    """The last section of a page, from its title on, if it is this one."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    place = text.find(f"\n## {title}\n")
    return text[place:] if place >= 0 else ""


def page(found: dict[tuple[str, str], dict[str, str]]) -> str:
    """docs/architectures.md."""
    counts = {o: sum(r["outcome"] == o for r in found.values()) for o in ("works", "refused", "not tried", "fault")}
    lines = [
        "# Architectures",
        "",
        "Every masked and causal LM class of transformers, and every encoder-decoder of text, tried small: made from "
        "its config with drawn weights, checked,",
        "distilled into half of its layers and 80 % of its tokens, exported, and opened by stock transformers. "
        "Written by",
        "`python scripts/architectures.py RESULTS.jsonl --table docs/architectures.md`; transformers",
        f"{version('transformers')}, torch {version('torch').partition('+')[0]}. Another size or setting of an "
        "architecture may differ; "
        "whatever is",
        "loaded is proved again by the same rules.",
        "",
        f"{counts['works']} work, {counts['refused']} are refused in one line, {counts['not tried']} could not be "
        "made small here.",
    ]
    titles = {"works": "Works", "refused": "Refused", "not tried": "Not tried", "fault": "Faults"}
    for outcome, title in titles.items():
        rows = [row for row in found.values() if row["outcome"] == outcome]
        if rows:
            lines += ["", f"## {title}", "", "| class | model type | kind | note |", "| --- | --- | --- | --- |"]
            cells = ((r["class"], r["name"], r["kind"], r["note"].replace("|", "/").replace("<", "&lt;")) for r in rows)
            lines += [f"| {' | '.join(each)} |" for each in cells]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

"""Where dropped tokens go under each mapping and rule: hubs, special tokens, beginnings of words onto pieces.

    python benchmarks/mapping_quality.py bert-base-uncased --corpus text/ --keep-ratio 0.5

"of text" weighs each dropped token by how often the corpus has it.
"""

import argparse
import tempfile

import numpy as np

from glmd.data.token_store import build_token_store
from glmd.models.loading import load_model_as_saved
from glmd.models.source_tokenizer import load_source_tokenizer
from glmd.reporting.report import markdown_table
from glmd.vocabulary.mapping import forbidden_targets, map_tokens, token_classes
from glmd.vocabulary.selection import choose_kept_ids, must_keep_ids, parts_to_keep
from glmd.vocabulary.vocabulary import Vocabulary, in_degrees


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--corpus", nargs="+", required=True)
    parser.add_argument("--keep-ratio", type=float, default=0.5)
    options = parser.parse_args()
    tokenizer = load_source_tokenizer(options.model, kind=None)
    embeddings = load_model_as_saved(options.model).get_input_embeddings().weight.detach()[: len(tokenizer)]
    with tempfile.TemporaryDirectory() as folder:
        counts = build_token_store(folder, options.corpus, tokenizer).counts(len(tokenizer))
    classes, special = token_classes(tokenizer), {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    required, forbidden = must_keep_ids(tokenizer), forbidden_targets(tokenizer)
    rows = []
    for name, must_keep, never, method, of_class in (
        ("inner product, no rule", special, set(), "inner_product", None),
        ("... nothing onto special tokens", special, special, "inner_product", None),
        ("... characters kept (the default)", required, forbidden, "inner_product", None),
        ("... within class", required, forbidden, "inner_product", classes),
        ("cosine", required, forbidden, "cosine", None),
        ("... within class", required, forbidden, "cosine", classes),
        ("euclidean", required, forbidden, "euclidean", None),
    ):
        parts = parts_to_keep(tokenizer, "closed")
        kept = choose_kept_ids(counts, must_keep, keep_ratio=options.keep_ratio, parts=parts)
        token_map = map_tokens(embeddings, kept, method=method, forbidden_targets=never, classes=of_class)
        rows.append([name, *_measures(Vocabulary(kept, token_map, method, counts), classes, special, tokenizer)])
    header = ["mapping", "targets", "largest hub", "of tokens", "of text", "onto special", "same class", "of text"]
    print(markdown_table(header, rows))


def _measures(vocabulary: Vocabulary, classes: np.ndarray, special: set[int], tokenizer: object) -> list[str]:
    assert vocabulary.counts is not None
    degrees, dropped = in_degrees(vocabulary), vocabulary.dropped_ids
    targets, seen = vocabulary.kept_ids[vocabulary.token_map[dropped]], vocabulary.counts[dropped]
    hub = degrees.hubs[0][0]
    alike = classes[dropped] == classes[targets]
    return [
        f"{degrees.targets:,}",
        str(tokenizer.convert_ids_to_tokens(hub)),  # type: ignore[attr-defined]
        f"{degrees.largest_share:.1%}",
        f"{seen[targets == hub].sum() / seen.sum():.1%}",
        f"{np.isin(targets, list(special)).sum():,}",
        f"{alike.mean():.1%}",
        f"{seen[alike].sum() / seen.sum():.1%}",
    ]


if __name__ == "__main__":
    main()

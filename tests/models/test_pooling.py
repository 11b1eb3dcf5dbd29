"""The vector that a sentence encoder makes of a text, and the files that say how."""

import json

import pytest
import torch

from glmd.errors import ModelError
from glmd.models.pooling import Pooling, pooling_of


@pytest.mark.parametrize("mode", ["mean", "cls", "last"])
@pytest.mark.parametrize("normalizes", [False, True])
def test_a_vector_is_that_of_the_tokens_alone(mode, normalizes):
    states = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
    found = Pooling(mode, normalizes)(states.masked_fill(mask[..., None] == 0, torch.inf), mask)
    for i, count in enumerate((5, 2, 3)):
        rows = states[i, :count]
        twin = {"mean": sum(rows) / count, "cls": rows[0], "last": rows[-1]}[mode]
        twin = twin / twin.square().sum().sqrt() if normalizes else twin
        torch.testing.assert_close(found[i], twin)
    assert Pooling(mode)(states.bfloat16(), mask).dtype == torch.float32


def write(folder, told, kinds=("Transformer", "Pooling"), **settings):
    rows = [
        {"path": "" if kind == "Transformer" else f"{i}_{kind}", "type": f"a.{kind}"} for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(rows))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling/config.json").write_text(json.dumps(told))
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))


def test_both_forms_of_the_file_are_read(tmp_path):
    for told, mode in (
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": ["mean"]}, "mean"),
        ({}, "mean"),
    ):
        write(tmp_path, told)
        assert pooling_of(tmp_path) == Pooling(mode)
    write(tmp_path, {}, ("Transformer", "Pooling", "Normalize"), prompts={"q": "q: "}, default_prompt_name="q")
    assert pooling_of(tmp_path) == Pooling("mean", True, "q: ", ("q: ",))
    (tmp_path / "modules.json").unlink()
    assert pooling_of(tmp_path) is None
    assert pooling_of(tmp_path, "cls").mode == "cls"


def test_what_is_not_distilled_is_refused_by_file(tmp_path):
    for told, kinds, given, settings, says in (
        ({"pooling_mode": ["mean", "max"]}, None, None, {}, "1_Pooling/config.json: pools by mean, max; supported is"),
        ({"pooling_mode_max_tokens": True}, None, None, {}, "pools by max_tokens"),
        ({}, ("Transformer", "Pooling", "Dense"), None, {}, "modules.json: names a Dense, which is not distilled"),
        ({}, ("Transformer",), None, {}, "names no Pooling"),
        ({}, None, "cls", {}, "pooling has no effect: .*1_Pooling/config.json says it; remove it"),
        ({}, None, None, {"default_prompt_name": "q"}, "default_prompt_name 'q' is none of its prompts"),
        (
            {"include_prompt": False},
            None,
            None,
            {"prompts": {"q": "q: "}, "default_prompt_name": "q"},
            "include_prompt false leaves the prompt out",
        ),
    ):
        write(tmp_path, told, kinds or ("Transformer", "Pooling"), **settings)
        with pytest.raises(ModelError, match=says):
            pooling_of(tmp_path, given)

"""The Megatron back end on four ranks, and checkpoints that go from layout to layout. Real ranks over gloo, started once."""

from __future__ import annotations

import pytest
import torch
from megatron_cases import LAYOUTS, PP, assert_layout_computes_what_one_process_does, cases, joined, settings_of

from metis_fast.errors import CheckpointError
from metis_fast.train.megatron.task import Task

CASES = cases(4)


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_a_layout_computes_what_one_process_does(start, truth, models, layout, model):
    assert_layout_computes_what_one_process_does(start, truth, models, layout, model)


@pytest.mark.parametrize(
    ("model", "written", "others", "dtype"),
    [
        pytest.param("tied", "tp2 pp2", ["dp2", "pp2 dp2"], "float32", marks=pytest.mark.slow),
        pytest.param("tied", "pp2", ["tp2 sp", "dp2 whole optimizer"], "bfloat16", marks=pytest.mark.slow),
        ("untied", "dp2 overlapped", ["tp2 pp2"], "bfloat16"),
        ("untied", "dp2 whole optimizer", ["pp2 uneven"], "float32"),
        pytest.param("deep", "pp2 interleaved", ["tp2 dp2 overlapped"], "float32", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_goes_from_layout_to_layout_without_losing_a_bit(
    start, groups, models, tmp_path, dtype, model, written, others
):
    """Saved under one layout, loaded and saved by others in turn, and resumed under the first one: the step that follows is the
    one that would have followed, so weights, masters and moments are what they were."""

    def ask(layout, method, *arguments):
        settings = settings_of(groups, LAYOUTS[layout], {"dtype": dtype})
        task = Task(settings, models(model), settings.train.optim, 10)
        return start(settings.train.megatron).call(method, task, *arguments)

    folders = [tmp_path / str(i) for i in range(len(others) + 1)]
    for folder in folders:
        folder.mkdir()
    saved = ask(written, "run", [groups, groups[::-1]], [], folders[0], None)
    for layout, load, save in zip(others, folders[:-1], folders[1:], strict=True):
        ask(layout, "move", load, save)
    back = ask(written, "run", [groups[::-1]], [], None, folders[-1])
    assert back[0][1][0] == saved[0][1][1]
    whole, after = (joined(part for _, _, part in found) for found in (saved, back))
    assert after.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(after[name], value), name


def test_a_checkpoint_of_another_model_is_refused(start, models, groups, tmp_path):
    settings = settings_of(groups, PP)
    ranks = start(settings.train.megatron)
    task = Task(settings, models("tied"), settings.train.optim, 10)
    ranks.call("run", task, [groups], [], tmp_path, None)
    for model in ("deep", "text"):
        other = Task(settings, models(model), settings.train.optim, 10)
        with pytest.raises(CheckpointError, match=r"does not fit this run \(.*resume with the model, model.freeze and"):
            ranks.call("move", other, tmp_path, tmp_path / model)

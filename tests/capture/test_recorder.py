"""The recorder keeps the right rows and steps and changes nothing."""

import pytest
import torch
from tiny_infinity import SCALES, WIDTH, tiny_pipeline

from pysteer.capture import Recorder
from pysteer.errors import InputError, PysteerError

PROMPTS = ["a red circle", "a large green star on a blue background", "a cross"]


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def test_records_what_the_modules_returned(pipe):
    seen: list[torch.Tensor] = []
    hook = pipe.transformer.blocks[1].register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    try:
        with Recorder(pipe, "ca_block", rows="all") as recorder:
            out = pipe(PROMPTS, seeds=4)
    finally:
        hook.remove()
    assert len(seen) == len(SCALES)
    for step, expected in enumerate(seen):
        assert torch.equal(recorder.get("ca_block.1", step), expected)
        assert expected.shape == (6, SCALES[step][0] * SCALES[step][1], WIDTH)
    assert torch.equal(out.features, pipe(PROMPTS, seeds=4).features)


def test_rows_steps_and_several_runs(pipe):
    with Recorder(pipe, ["ffn.0", "text.output"], steps=[2], rows="all") as recorder:
        pipe(PROMPTS, seeds=4)
    everything = recorder.get("ffn.0", 2)
    assert recorder.recorded() == [("text.output", 0), ("ffn.0", 2)]
    parts = {}
    for rows in ("cond", "uncond"):
        with Recorder(pipe, ["ffn.0", "text.output"], steps=[2], rows=rows) as recorder:
            pipe(PROMPTS[:1], seeds=4)
            pipe(PROMPTS[1:], seeds=5)
        parts[rows] = recorder.get("ffn.0", 2)
        if rows == "cond":  # runs of different text lengths are padded
            assert recorder.get("text.output").shape[:2] == (3, 9)
            assert recorder.lengths("text.output").tolist() == [4, 9, 3]
            assert recorder.get("text.output")[0, 4:].abs().sum() == 0
    assert torch.allclose(torch.cat((parts["cond"], parts["uncond"])), everything, atol=1e-5)


def test_what_was_not_recorded_is_named(pipe):
    with Recorder(pipe, "pooled", steps=[1]) as recorder:
        pipe(PROMPTS)
    assert recorder.get("pooled").shape == (3, 1, WIDTH)
    with pytest.raises(InputError, match="allowed: pooled step 0"):
        recorder.get("pooled", 1)
    with pytest.raises(InputError, match="did you mean pooled"):
        Recorder(pipe, "pooling")
    with pytest.raises(InputError, match="given twice"):
        Recorder(pipe, ["ffn", "ffn.1"])


def test_a_module_run_outside_a_generation_is_an_error(pipe):
    with Recorder(pipe, "ffn.0"), pytest.raises(PysteerError, match="announced 0"):
        pipe.transformer.blocks[0].ffn(torch.zeros(2, 1, WIDTH))

"""Oracle: transformers. The streamed, staged forward gives its fp32 logits, for every row and option."""

import pytest
import torch

from lissom.models import Model, open_checkpoint
from tiny import KINDS, VOCAB, tiny_model

TOKENS = 20  # longer than every sliding window of KINDS


def reference(model, ids, **inputs):
    with torch.no_grad():
        out = model(input_ids=ids, **inputs)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def tokens(batch=2, length=TOKENS):
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def staged(model, ids):
    """Block by block, stage by stage, as the pipeline does it."""
    h = model.embed(ids)
    for i in range(model.blocks):
        block = model.load_block(i)
        run = block.start(h)
        for stage in block.stages:
            x = run.input()
            assert all(x.shape == (*ids.shape, linear.columns) for linear in stage)
            run.advance()
        h = run.output()
    return model.head(h)


@pytest.mark.parametrize("kind", KINDS)
def test_staged_forward_gives_the_logits_of_transformers(kind, tmp_path):
    theirs = tiny_model(kind, tmp_path)
    ids = tokens()
    expected = reference(theirs, ids)
    with torch.no_grad():
        got = staged(Model(open_checkpoint(tmp_path)), ids)
    assert expected.std() > 0.1
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < 1e-4

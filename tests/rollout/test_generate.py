import pytest
import torch

from fastrlhf.rollout.generate import decode
from tests import tiny


@pytest.mark.parametrize("use_cache", [True, False])
def test_tokens_are_the_drawn_ones_and_logits_those_of_the_whole_text(use_cache):
    model = tiny.policy()
    texts = torch.tensor([[5, 6, 7], [8, 9, 10]])
    given, seen = torch.tensor([[11, 12, 13, 14], [15, 1, 17, 18]]), []

    def draw(logits):
        seen.append(logits)
        return given[:, len(seen) - 1]

    decode(model, texts, 4, draw, lambda: torch.tensor([False, len(seen) > 1]), use_cache=use_cache)
    assert len(seen) == 4  # the first text needs four tokens, so decoding continues after the EOS of the second
    with torch.no_grad():
        expected = model(torch.cat([texts, given], 1), use_cache=False).logits[:, 2:-1]
    torch.testing.assert_close(seen[3][0], expected[0, 3], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.stack(seen, 1)[1, :2], expected[1, :2], rtol=1e-5, atol=1e-5)


def test_decoding_stops_when_every_text_has_ended():
    count = []
    decode(
        tiny.policy(),
        torch.tensor([[5, 6, 7]]),
        50,
        lambda logits: count.append(1) or logits.argmax(-1),
        lambda: torch.tensor([len(count) == 3]),
    )
    assert len(count) == 3

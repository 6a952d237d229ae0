"""The layers of every family, compiled: in training and in decoding. Minutes; `test_families` runs the same code
uncompiled."""

import copy

import pytest
import torch
from tiny_families import CASES, CONTEXT, VOCABULARY, pair, tokens

pytestmark = [
    pytest.mark.long,
    pytest.mark.parametrize("case", CASES),
    pytest.mark.usefixtures("compiled_code"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # Dynamo does
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # Dynamo looks at it
]


def test_a_compiled_layer_has_the_same_gradients(case: str) -> None:
    model = copy.deepcopy(pair(case)[0]).train()
    inputs = tokens(2, CONTEXT)
    found = []
    for model.compiled in (False, True):
        model.zero_grad()
        model(inputs).square().mean().backward()
        found.append({name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None})
    for name, gradient in found[0].items():
        assert (found[1][name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name


@torch.inference_mode()
def test_a_compiled_step_equals_the_whole_forward_pass(case: str) -> None:
    model, _ = pair(case)
    decoding, row = model.decoding(), tokens(1, CONTEXT)[0]
    decoding.compile()
    found = [decoding.read([row[:3].tolist()], room=CONTEXT - 3)]
    found += [decoding.step([int(token)]) for token in row[3:]]
    torch.testing.assert_close(torch.cat(found), model(row[None])[0, 2:], atol=1e-4, rtol=0)
    assert found[0].shape == (1, VOCABULARY)

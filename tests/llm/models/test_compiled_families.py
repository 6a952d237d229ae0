"""The layers of every family, compiled, in training. Minutes; `test_families` runs the same code uncompiled."""

import copy

import pytest
from tiny_families import CASES, CONTEXT, pair, tokens

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

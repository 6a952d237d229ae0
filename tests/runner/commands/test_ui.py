"""`run ui`: the address that it prints opens aim's metrics on the losses of a recipe."""

import base64
import json
from urllib.parse import unquote

from runner.commands.ui import losses_of


def chosen(experiment: str | None) -> dict[str, object]:
    """As `aim64decode` of aim's page reads it."""
    text = losses_of(experiment)
    assert text.startswith("O-") and not set(text) & set("+/=")
    decoded: dict[str, object] = json.loads(unquote(base64.urlsafe_b64decode(text[2:] + "==").decode()))
    return decoded


def test_the_losses_of_a_recipe_are_chosen_whatever_its_name() -> None:
    for name in ("mine", 'a "b" 中文 / 100%'):
        found = chosen(name)
        assert found["query"] == f"run.experiment == {json.dumps(name)}"
        assert [option["label"] for option in found["options"]] == ["loss"]  # type: ignore[attr-defined]


def test_without_a_recipe_all_losses_are_chosen() -> None:
    assert chosen(None)["query"] == ""

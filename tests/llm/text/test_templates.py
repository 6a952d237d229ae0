"""Templates: their syntax, and the fields they name."""

import pytest

from llm.text.templates import split_template, split_text, with_field


def test_literal_braces_are_doubled() -> None:
    assert split_template('{{"x": {a}}}') == ('{"x": ', "a", "}")


@pytest.mark.parametrize("name", ["Review Text", "Note: text", "a.b", "0", "a!r", "price [€]"])
def test_a_name_is_all_that_is_between_the_braces(name: str) -> None:
    assert split_template(f"a {{{name}}}") == ("a ", name, "")


@pytest.mark.parametrize("template", ["{", "{}", "{ }", "a}", "{a{b}}", "{a:{b}}"])
def test_what_is_not_a_template_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match="is not a template"):
        split_template(template)


def test_a_text_setting_is_a_field_or_a_template() -> None:
    assert split_text("my-body") == ("", "my-body", "")
    assert split_text("{title}\n{body}") == ("", "title", "\n", "body", "")


@pytest.mark.parametrize("text", ["{}", "{ }", "{{x}}"])
def test_a_text_setting_with_braces_has_to_name_a_field_in_them(text: str) -> None:
    with pytest.raises(ValueError, match="the name of a field"):
        split_text(text)


def test_with_field_requires_a_field() -> None:
    assert with_field("a {b}") == ("a ", "b", "")
    with pytest.raises(ValueError, match="'label': expected the name of a field in braces"):
        with_field("label")

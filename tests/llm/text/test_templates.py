"""Templates: their syntax, and the fields they name."""

import pytest

from llm.text.templates import split_template, split_text, with_field


def test_literal_braces_are_doubled() -> None:
    assert split_template('{{"x": {a}}}') == ('{"x": ', "a", "}")


@pytest.mark.parametrize("template", ["{", "{}", "{a!r}", "{a:3}", "a}", "{a.b}", "{two words}"])
def test_what_is_not_a_template_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match="is not a template"):
        split_template(template)


def test_a_text_setting_is_a_field_or_a_template() -> None:
    assert split_text("my-body") == ("", "my-body", "")
    assert split_text("{title}\n{body}") == ("", "title", "\n", "body", "")


@pytest.mark.parametrize("text", ["{}", "{0}", "{a.b}", "{{x}}"])
def test_a_text_setting_with_braces_has_to_name_a_field_in_them(text: str) -> None:
    with pytest.raises(ValueError, match="the name of a field"):
        split_text(text)


def test_with_field_requires_a_field() -> None:
    assert with_field("a {b}") == ("a ", "b", "")
    with pytest.raises(ValueError, match="'label': expected the name of a field in braces"):
        with_field("label")

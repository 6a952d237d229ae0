"""Replacing personal data: each kind by its name, and nothing that only looks like it."""

import pytest

from llm.text.personal import redact


@pytest.mark.parametrize(
    ("text", "after"),
    [
        ("Write to jane.doe+x@mail.example.org.", "Write to [e-mail address]."),
        ("电话13800138000，请联系张三", "电话[telephone number]，请联系张三"),
        ("请拨打 13800138000 联系", "请拨打 [telephone number] 联系"),
        ("门诊 010-62345678", "门诊 [telephone number]"),
        ("Call +49 30 901820 or (212) 555-0187.", "Call [telephone number] or [telephone number]."),
        ("身份证 11010519491231002X 已登记", "身份证 [identity number] 已登记"),
        ("身份证 110105194912310021 有误", "身份证 110105194912310021 有误"),  # the check digit is wrong
        ("Card 4111 1111 1111 1111, not 4111 1111 1111 1112", "Card [card number], not 4111 1111 1111 1112"),
        ("IBAN DE89 3704 0044 0532 0130 00", "IBAN [account number]"),
        ("SSN 078-05-1120", "SSN [social security number]"),
        ("In 2019-2020 the dose was 10-20 mg, p = 0.0512", "In 2019-2020 the dose was 10-20 mg, p = 0.0512"),
        ("doi:10.1016/j.cell.2019.05.031, chr7:140453136", "doi:10.1016/j.cell.2019.05.031, chr7:140453136"),
    ],
)
def test_personal_data_is_replaced_by_its_name(text: str, after: str) -> None:
    assert redact(text) == after


def test_only_the_kinds_asked_for_are_replaced() -> None:
    text = "a@b.example and 13800138000"
    assert redact(text, ("email",)) == "[e-mail address] and 13800138000"
    assert redact(text, ("telephone",)) == "a@b.example and [telephone number]"
    assert redact(redact(text)) == redact(text)


def test_data_far_into_a_long_text_is_replaced_too() -> None:
    assert redact("word " * 50_000 + "a@b.example").endswith("word [e-mail address]")

"""Documents of a corpus: their language, and samples of them by hash."""

import json
from pathlib import Path

import pytest

from llm.text.documents import language_by_script, read_documents, sample_documents


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The fever began three days ago.", "en"),
        ("患者三天前开始发烧，服用 ibuprofen 后好转。", "zh"),
        ("患者は三日前から熱があります。", "ja"),
        ("환자는 사흘 전부터 열이 납니다.", "ko"),
        ("Жар начался три дня назад.", "cyrillic"),
        ("La fièvre a commencé il y a trois jours, dès le début de l'été.", "latin"),
        ("12345 + 6 = ?", "other"),
    ],
)
def test_the_script_suggests_the_language(text: str, language: str) -> None:
    assert language_by_script(text) == language


def write(path: Path, texts: list[str], **fields: object) -> None:
    rows = [json.dumps({"text": text, "source": "s", "passes": 1, **fields}, ensure_ascii=False) for text in texts]
    path.write_text("".join(row + "\n" for row in rows))


def test_the_language_of_the_source_takes_precedence(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ["Bonjour tout le monde"], language="fr")
    assert [document.language for document in read_documents(tmp_path / "a.jsonl")] == ["fr"]


def test_a_sample_is_about_as_large_as_asked_and_grows_by_adding_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path, [f"document number {number}" for number in range(2000)])
    size = path.stat().st_size
    small, large = ([document.text for document in sample_documents(path, size * part // 10)] for part in (2, 5))
    assert 300 < len(small) < 500
    assert 900 < len(large) < 1100
    assert [text for text in large if text in set(small)] == small
    assert len(list(sample_documents(path, 10 * size))) == 2000

"""`run check`: what people's own files hold, and what of them cannot be used."""

import json
from pathlib import Path

import pytest
from small_recipe import Folder
from workbooks import write_xlsx

from llm.tokenizer.train_bpe import train_bpe
from runner.cli import main


def check(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main(["check", *words]) == code
    return capsys.readouterr().out


def test_a_messy_table_is_told_field_by_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"Größe und Länge {n};{'gut' if n % 20 else 'schlecht'};{'' if n % 5 < 2 else n}" for n in range(40)]
    text = "\r\n".join(["Text der Bewertung;Urteil;Nr", *rows, rows[0], 'a;"b"c;1', "jo@example.org und mehr;gut;9"])
    (tmp_path / "a.csv").write_bytes(text.encode("cp1252"))
    told = check(capsys, str(tmp_path / "a.csv"), "--encoding", "cp1252")
    assert "1 file (.csv), 43 rows" in told
    lines = {line.split("  ")[0]: line for line in told.splitlines()}
    assert "17 (40%)" in lines["Nr"]
    assert "'Urteil' has 2 values: 'gut' 39 (93%), 'schlecht' 3 (7%)" in told
    assert "the most frequent one has 13 times the rows of the rarest" in told
    assert "duplicates: 1 row equal" in told
    assert f"1 text with an e-mail address, the first in 'Text der Bewertung' of {tmp_path}/a.csv:44" in told
    assert f"cannot be used: 1 row, the first {tmp_path}/a.csv:43" in told
    assert "a recipe would take it as labels: 'Text der Bewertung' with the label 'Urteil'" in told


def test_as_json_it_stands_alone_and_counts_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_xlsx(tmp_path / "a.xlsx", {"Data": [["question", "answer"], ["why me", "because"], ["who", 5]]})
    train_bpe(["why me because"] * 3, 270, min_frequency=1, pre_tokenizer_name="gpt-2", allow_smaller=True).save(
        tmp_path / "t"
    )
    found = json.loads(check(capsys, str(tmp_path / "*.xlsx"), "--json", "--tokenizer", str(tmp_path / "t")))
    assert (found["rows"], found["use"]["kind"]) == (2, "pairs")
    assert found["fields"]["answer"]["types"] == {"text": 1, "a number": 1}
    assert found["tokens"]["max"] >= found["tokens"]["p50"] > 0
    assert set(found["longer_than"].values()) == {0}


def test_a_recipe_is_checked_by_its_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Folder(tmp_path)
    assert "every table can be used" in check(capsys, str(folder.recipe))
    with (tmp_path / "text.jsonl").open("a") as file:
        file.write('{"text": null}\n')
    assert "stage.corpus.sources[0]: 1 of 197 rows cannot be used" in check(capsys, str(folder.recipe), code=2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.csv"], "none.csv: expected a file, a glob, or a folder"),
        (["a.txt", "--encoding", "utf-99"], "--encoding: expected one that Python knows"),
        (["a.txt", "--tokenizer", "a.txt"], "--tokenizer: a.txt: expected a tokenizer"),
    ],
)
def test_what_cannot_be_checked_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    assert main(["check", *words]) == 2
    assert message in capsys.readouterr().err

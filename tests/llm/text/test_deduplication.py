"""MinHash signatures, and the duplicates that they find."""

import random

import numpy as np
import pytest

from llm.text import minhash
from llm.text.deduplication import NEAR, _mark

WORDS = [f"{a}{b}" for a in "kmnprstvbd" for b in ["a", "e", "i", "o", "u", "an", "en", "ir"]]
HAN = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜金生丽水玉出昆冈"


def english(seed: int, words: int = 400) -> list[str]:
    return random.Random(seed).choices(WORDS, k=words)


def chinese(seed: int, characters: int = 400) -> list[str]:
    return random.Random(seed).choices(HAN, k=characters)


def shingles(text: str) -> set[int]:
    hashes, _ = minhash.shingle_hashes([text], np.zeros(1, dtype=np.uint64))
    return set(hashes.tolist())


def estimate(first: str, second: str) -> float:
    signed = minhash.low_bytes(minhash.signatures([first, second], np.array([1, 2], dtype=np.uint64)))
    equal = float((signed[0] == signed[1]).mean())
    return (equal - 1 / 256) / (1 - 1 / 256)


def jaccard_by_hand(first: list[str], second: list[str]) -> float:
    one, two = ({tuple(tokens[i : i + 5]) for i in range(len(tokens) - 4)} for tokens in (first, second))
    return len(one & two) / len(one | two)


@pytest.mark.parametrize(("tokens", "glue"), [(english, " "), (chinese, "")])
def test_shingles_are_runs_of_five_words_or_five_chinese_characters(tokens, glue: str) -> None:
    first = tokens(1)
    second = first[:300] + tokens(2)[:100]
    one, two = shingles(glue.join(first)), shingles(glue.join(second))
    assert len(one & two) / len(one | two) == pytest.approx(jaccard_by_hand(first, second), abs=1e-12)


def test_mixed_text_has_words_and_characters_as_its_tokens() -> None:
    assert len(shingles("用PyTorch训练model")) == 1  # 用 / pytorch / 训 / 练 / model: five tokens are one run of five
    assert len(shingles("用PyTorch训练模型")) == 2


def test_case_spacing_and_punctuation_do_not_count() -> None:
    assert shingles("The quick, brown fox -- jumps over\nIT") == shingles("the quick brown fox jumps over it")


def test_the_order_of_characters_in_a_word_and_of_words_counts() -> None:
    assert shingles("one two three four five") != shingles("one two three five four")
    assert shingles("ab") != shingles("ba")


def test_shingles_never_run_across_two_documents() -> None:
    texts = ["one two three four five six", "七八", "seven", "eight nine ten eleven twelve"]
    fallback = np.arange(4, dtype=np.uint64)
    hashes, offsets = minhash.shingle_hashes(texts, fallback)
    for number, text in enumerate(texts):
        assert set(hashes[offsets[number] : offsets[number + 1]].tolist()) == shingles(text)


def test_texts_without_words_equal_only_themselves() -> None:
    texts = ["!!! ??? ...", "a word", "--- *** ---", ""]
    signed = minhash.signatures(texts, np.array([10, 11, 12, 13], dtype=np.uint64))
    assert len({row.tobytes() for row in signed}) == 4


@pytest.mark.parametrize(("tokens", "glue"), [(english, " "), (chinese, "")])
@pytest.mark.parametrize("changed", [8, 40, 200])
def test_signatures_estimate_the_similarity(tokens, glue: str, changed: int) -> None:
    errors = []
    for seed in range(20):
        first = tokens(seed)
        second = first[: 400 - changed] + tokens(seed + 1000)[:changed]
        errors.append(estimate(glue.join(first), glue.join(second)) - jaccard_by_hand(first, second))
    # One estimate is off by at most sqrt(1/4 / 128) = 0.044 (one standard deviation), the mean of 20 by 0.01.
    assert abs(np.mean(errors)) < 0.03
    assert np.std(errors) < 0.066


# Made by rensa 0.5.0; a different result requires a new version of the kind `corpus`.
GOLDEN = [[3726112083, 3345515971, 3385591801, 3554577137], [3515316988, 3427187940, 3293319275, 2792398789]]


def test_signatures_are_the_same_on_every_machine() -> None:
    signed = minhash.signatures(
        ["one two three four five six seven", "永和九年岁在癸丑暮春之初"], np.zeros(2, dtype=np.uint64)
    )
    assert signed[:, :4].tolist() == GOLDEN


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.8, 0.9, 0.95])
def test_bands_find_pairs_of_the_wanted_similarity_and_few_of_less(similarity: float) -> None:
    bands, rows = minhash.banding(similarity)
    assert bands * rows <= minhash.SLOTS
    assert 1 - (1 - similarity**rows) ** bands >= 0.99
    assert 1 - (1 - (similarity / 3) ** rows) ** bands < 0.2


def test_band_hashes_are_equal_exactly_where_the_band_is() -> None:
    signed = np.random.default_rng(0).integers(0, 2**32, size=(2, 128), dtype=np.uint32)
    signed[1, 12:18] = signed[0, 12:18]
    hashes = minhash.band_hashes(signed, bands=21, rows=6)
    assert np.flatnonzero(hashes[:, 0] == hashes[:, 1]).tolist() == [2]


def verdicts(hashes: list[int], likeness: set[tuple[int, int]]) -> list[int]:
    found = np.zeros(len(hashes), dtype=np.uint8)

    def alike(earlier, later):
        return np.array([(int(a), int(b)) in likeness for a, b in zip(earlier, later, strict=True)], dtype=bool)

    _mark(found, np.array(hashes, dtype=np.uint64), NEAR, alike)
    return found.tolist()


def test_of_a_group_the_first_in_source_order_stays() -> None:
    assert verdicts([9, 5, 9, 5, 9], {(0, 2), (0, 4), (1, 3)}) == [0, 0, NEAR, NEAR, NEAR]


def test_a_shared_band_without_similarity_drops_nothing() -> None:
    assert verdicts([7, 7, 7], set()) == [0, 0, 0]


def test_documents_unlike_the_first_of_their_band_are_compared_with_each_other() -> None:
    assert verdicts([7, 7, 7, 7, 7], {(1, 3), (2, 4)}) == [0, 0, 0, NEAR, NEAR]

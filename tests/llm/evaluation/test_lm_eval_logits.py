"""Scores of lm-eval without the logits of a whole batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

from llm.evaluation import lm_eval_logits
from llm.evaluation.lm_eval_logits import with_late_logits
from llm.tokenizer.train_bpe import train_bpe

VOCABULARY = 5000


class Largest(TorchDispatchMode):
    """The numbers in the largest tensor that any operation made."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        found = [leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        self.numbers = max([self.numbers, *found])
        return made


@pytest.mark.filterwarnings("default")  # lm-eval's own
def test_lm_eval_scores_the_same_without_the_logits_of_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.models.huggingface import HFLM

    train_bpe(["heart"], 300, min_frequency=1, pre_tokenizer_name="gpt-2", allow_smaller=True).save(tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(vocab_size=VOCABULARY, final_logit_softcapping=0.5, **sizes, **heads)).eval()
    plain, late = (
        wrapper(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(tmp_path), batch_size=8)
        for wrapper in (HFLM, with_late_logits(HFLM))
    )
    ids = torch.randint(VOCABULARY, (12, 60)).tolist()
    requests = [(("a", str(n)), row[: 5 + 3 * n], row[5 + 3 * n : 9 + 4 * n]) for n, row in enumerate(ids)]
    same = [(("b", str(n)), ids[0][:20], [n]) for n in range(3)]  # answers of a token, which share a row
    greedy = model(torch.tensor([ids[1][:30]])).logits[0, -1].argmax().item()
    requests += [*same, (("c", "0"), ids[1][:30], [greedy])]
    monkeypatch.setattr(lm_eval_logits, "LOGITS", 7 * VOCABULARY)
    with Largest() as of_plain:
        expected = plain._loglikelihood_tokens(requests, disable_tqdm=True)
    with Largest() as of_late:
        found = late._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [alike for _, alike in found] == [alike for _, alike in expected] and found[-1][1]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-5)
    assert of_plain.numbers > 8 * 45 * VOCABULARY and of_late.numbers <= max(7 * VOCABULARY, VOCABULARY * 16)
    assert model(torch.tensor([ids[0]])).logits.shape == (1, 60, VOCABULARY)  # it is as it was

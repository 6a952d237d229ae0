"""What each score means, in a sentence for whoever reads a report. Benchmarks of lm-eval have scores of their own."""

MEANINGS = {
    "accuracy": "share of the rows whose answer is right; 1 is best",
    "accuracy_per_byte": "the same, where a choice's likelihood is divided by its length; 1 is best",
    "macro_f1": "mean over the labels of F1, which counts wrong hits and misses; rare labels weigh as much; 1 is best",
    "micro_f1": "F1 over all labels of all rows together, so that frequent labels weigh more; 1 is best",
    "subset_accuracy": "share of the rows of which all labels are right, none missing and none too many; 1 is best",
    "ece": "how far stated probabilities are from how often they are right, on average; 0 is best",
    "perplexity": "among how many equally likely tokens the model chooses; lower is better, for models of one tokenizer",
    "bits_per_byte": "bits that the model needs for a byte of the text; lower is better, and comparable between all models",
    "chrf": "overlap of an answer's pieces of words with the expected answer, 0 to 100; says little of whether it is true",
    "bleu": "overlap of an answer's runs of words with the expected answer, 0 to 100; higher is closer to its wording",
    "length_ratio": "length of the answers over that of the expected ones; 1 is as long",
    "repetition": "share of an answer that repeats itself; near 0 in ordinary text",
    "win_rate": "share of the prompts whose answer is closer to the expected one than the other model's; 0.5 is a draw",
    "likelihood_win_rate": "share of the expected answers that this model finds likelier than the other does; 0.5 is a draw",
    "chrf_change": "chrF of this model minus that of the other; above 0 is better",
    "bits_per_byte_change": "bits per byte of the expected answers minus those of the other model; below 0 is better",
    "length_change": "characters of the answers minus those of the other model's",
    "repetition_change": "repetition minus that of the other model; below 0 is better",
}


def meaning(score: str) -> str:
    """The meaning of a score `task.metric`; empty if it is not known."""
    return MEANINGS.get(score.rpartition(".")[2], "")

"""The page that shows what two models answered to the same prompts: one HTML file without scripts or other files."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

MEASURES = {"chrf": "chrF", "bits_per_byte": "bits per byte", "length": "characters", "repetition": "repeated"}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 72rem; margin: auto; padding: 1rem }
table { border-collapse: collapse; width: 100%; table-layout: fixed; margin: 0.5rem 0 2rem }
th, td { border: 1px solid #ccc; padding: 0.5rem; text-align: left; vertical-align: top; overflow-wrap: anywhere }
th { background: #f3f3f3; font-weight: 600 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; margin: 0 }
small { color: #666 }
"""


def page(
    task: str,
    examples: Sequence[Mapping[str, Any]],
    *,
    scores: Mapping[str, float],
    intervals: Mapping[str, Sequence[float]],  # of the scores, at 95% confidence
) -> str:
    """The whole page: the scores, then every prompt with the reference answer and the answers of both models."""
    measured = "".join(_measured(name, value, intervals.get(name, ())) for name, value in scores.items())
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{escape(task)}: side by side</title>
<style>{STYLE}</style>
<h1>{escape(task)}: side by side</h1>
<p>{len(examples):,} prompts. A win is an answer nearer to the wanted one by chrF, or a wanted answer that is likelier; a tie
is half of one. A change is the model's value minus that of the other.</p>
<table>
<tr><th>measured</th><th>mean</th><th>95% interval</th></tr>
{measured}</table>
{"".join(_pair(example) for example in examples)}</html>
"""


def _measured(name: str, value: float, ends: Sequence[float]) -> str:
    interval = " to ".join(f"{end:.4g}" for end in ends)
    return f"<tr><td>{escape(name)}</td><td>{value:.4g}</td><td>{interval}</td></tr>\n"


def _pair(example: Mapping[str, Any]) -> str:
    answers = "".join(
        f"<td><pre>{escape(text)}</pre></td>"
        for text in (example["wanted"], example["other"]["text"], example["found"]["text"])
    )
    measures = "".join(f"<td><small>{_measures(example[side])}</small></td>" for side in ("other", "found"))
    return f"""<h2>{example["row"]:,}</h2>
<pre>{escape(example["prompt"])}</pre>
<table>
<tr><th>wanted</th><th>the other model</th><th>the model</th></tr>
<tr>{answers}</tr>
<tr><td></td>{measures}</tr>
</table>
"""


def _measures(answer: Mapping[str, Any]) -> str:
    return ", ".join(f"{label} {answer[name]:.4g}" for name, label in MEASURES.items())

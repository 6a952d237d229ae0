"""Prompts to try on the page of `run serve`: from the held-out rows of the recipe's evaluations."""

from collections.abc import Iterator

from llm.errors import InputError
from runner.errors import RecipeError
from runner.recipe.recipe import Recipe
from runner.serving.predictions import prompts_of
from runner.stages.evaluate import Evaluate
from runner.stages.fields.eval_tasks.questions import ChatTask

SAMPLES = 3  # of each task
LONGEST = 600  # characters


def sample_prompts(recipe: Recipe) -> list[str]:
    """A few short prompts of each task whose rows are at hand; tasks over the same prompts have them once."""
    return list(dict.fromkeys(prompt for task in _tasks(recipe) for prompt in _of_task(task)))


def _tasks(recipe: Recipe) -> Iterator[ChatTask]:
    for stage in recipe.stages.values():
        if isinstance(stage, Evaluate):
            yield from (task for task in stage.tasks if isinstance(task, ChatTask) and not task.files.hub)


def _of_task(task: ChatTask) -> list[str]:
    try:
        asked = [turns[0].message["content"] for turns, _ in prompts_of(task) if len(turns) == 1]
    except (InputError, RecipeError, OSError):  # a server answers without its recipe's data, too
        return []
    return [prompt for prompt in asked if isinstance(prompt, str) and len(prompt) <= LONGEST][:SAMPLES]

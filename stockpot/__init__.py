"""Stockpot from Python: load a recipe, plan it, run it, and use what it made.

    import stockpot

    recipe = stockpot.load("quickstart")                 # a path, or a name as the command line takes it
    recipe.plan()                                        # a table; in a notebook with its graph
    recipe.run(on_event=print)                           # runs what is not cached
    recipe.scores()                                      # {"scores": {"answers.chrf": 21.3}}
    recipe.path("chat")                                  # a folder that Transformers opens
    recipe.chat("What is a fever?")
    recipe.predict("new.csv")                            # a table of labels with their probabilities

It is what the command line does, with the same cache: names over `runner`, and nothing of its own. Importing it loads neither
torch nor any other slow library. Errors are of `stockpot.StockpotError`.
"""

from runner.errors import GateError, PausedError, RecipeError, StageError, StockpotError
from stockpot.recipe import LoadedRecipe, Report, ShownPlan, load

__all__ = [
    "GateError",
    "LoadedRecipe",
    "PausedError",
    "RecipeError",
    "Report",
    "ShownPlan",
    "StageError",
    "StockpotError",
    "load",
]

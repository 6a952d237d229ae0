"""The tasks of an evaluation, as a recipe writes them: a class for each, registered in `Task`.

The measuring itself is in `llm.evaluation`.
"""

from typing import Annotated

from pydantic import BeforeValidator, Field

from runner.stages.fields.eval_tasks.lm_eval import LmEvalTask, table_from_text
from runner.stages.fields.eval_tasks.multiple_choice import MultipleChoiceTask
from runner.stages.fields.eval_tasks.questions import AnswersTask, ClassificationTask, ComparisonTask, TextTask

_Table = Annotated[
    TextTask | ClassificationTask | MultipleChoiceTask | AnswersTask | ComparisonTask | LmEvalTask,
    Field(discriminator="task"),
]


Task = Annotated[_Table, BeforeValidator(table_from_text, json_schema_input_type=_Table | str)]
